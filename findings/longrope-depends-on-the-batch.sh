#!/usr/bin/env bash
# transformers 5.24.0: with longrope, a text's log-probabilities depend on its batch.
#
# Setting: a Phi-3 with rope_type "longrope", and a right-padded batch.
#   The limit, original_max_position_embeddings, is 16 here. The text has 8 tokens.
# Guess: the other row and the padding change nothing beyond rounding.
# Instead: one factor set, short or long, serves the whole batch.
#   A row of 17 tokens switches the 8-token text to the long factors as well.
#   Padding alone does it too: positions are counted over the padded width.
#   position_ids made from the attention mask avoid the padding's effect only.
#   The size depends on the weights. These are random, with initializer_range 0.1.
#
# Second: Phi3Config takes the limit as an argument of its own, 4096 by default.
# Guess: a limit given inside rope_parameters counts.
# Instead: 4096 replaces it without a message, so the switch comes far too late.
#   Without `factor` there is a message, but it does not mention this.
#
# Output (largest change of the text's log-probabilities against the text alone):
#   other row of 16 tokens: 0.000
#   other row of 17 tokens: 0.114
#   other row of 10 tokens, both padded to 17: 0.114
#   the same with position_ids from the mask: 0.000
#   other row of 17 tokens with position_ids: 0.114
#   limit given inside rope_parameters: 16, read back: 4096, messages: 0
#   other row of 100 tokens, with that limit: 0.000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet transformers==5.24.0 numpy==2.4.6
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"$dir/venv/bin/python" - <<'PY'
import logging, sys
import torch
from transformers import AutoModelForCausalLM, Phi3Config

notes = []
sys.excepthook = lambda kind, error, trace: sys.stderr.write(f"DIFFERENT FROM WHAT IS STATED: {error!r}\n")
logging.getLogger("transformers").handlers[0].addFilter(notes.append)  # keeps messages, prints none

def make(inside={}, **own):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0,
            "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, **inside}
    config = Phi3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=2, max_position_embeddings=128, initializer_range=0.1,
                        pad_token_id=0, bos_token_id=1, eos_token_id=2, rope_parameters=rope, **own)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()

words = torch.randint(3, 64, (128,), generator=torch.Generator().manual_seed(1))

def change(model, other, width, positions=False):  # the text, with a row of `other` tokens
    def logprobs(lengths, width):
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions else {}
        with torch.no_grad():
            logits = model(input_ids=words[:width] * mask, attention_mask=mask, **extra).logits
        return logits[0, :7].log_softmax(-1).gather(-1, words[1:8, None])
    return (logprobs([8, other], width) - logprobs([8], 8)).abs().max().item()

def check(label, value, large):
    print(f"{label}: {value:.3f}")
    if not (value > 0.01 if large else value < 1e-4):
        sys.exit(f"DIFFERENT FROM WHAT IS STATED: {label}")

model = make(original_max_position_embeddings=16)
check("other row of 16 tokens", change(model, 16, 16), False)
check("other row of 17 tokens", change(model, 17, 17), True)
check("other row of 10 tokens, both padded to 17", change(model, 10, 17), True)
check("the same with position_ids from the mask", change(model, 10, 17, True), False)
check("other row of 17 tokens with position_ids", change(model, 17, 17, True), True)

model = make(inside={"original_max_position_embeddings": 16})
limit = model.config.rope_parameters["original_max_position_embeddings"]
print(f"limit given inside rope_parameters: 16, read back: {limit}, messages: {len(notes)}")
if limit != 4096 or notes:
    sys.exit("DIFFERENT FROM WHAT IS STATED: 4096 replaces 16 without a message")
check("other row of 100 tokens, with that limit", change(model, 100, 100), False)
PY
