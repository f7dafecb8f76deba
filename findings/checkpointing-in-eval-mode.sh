#!/usr/bin/env bash
# transformers 5.24.0: gradient checkpointing does nothing in eval mode.
#
# Setting: a trainer keeps the model in eval mode, so that dropout stays off.
#   It calls model.gradient_checkpointing_enable(), then forward and backward.
# Guess: the backward pass recomputes each layer.
# Instead: it recomputes nothing, and neither pass warns.
#   model.is_gradient_checkpointing still says True.
#   Each GradientCheckpointingLayer looks at its own `training` flag.
# Way out: set training = True on these layers alone, and pass use_cache=False.
#   The modules below them, such as nn.Dropout in GPT-2, stay in eval mode.
# Limit: some families apply dropout in the layer itself, OPT for one.
#   There the way out turns that dropout on.
#
# Output (how often one MLP runs in a forward and a backward pass):
#   GPT-2: eval 1, train 2, flag on the layers alone 2; gradients equal: True
#   Llama: eval 1, train 2, flag on the layers alone 2; gradients equal: True
#   GPT-2, dropout 0.5, flag on the layers alone: dropout stays off: True
#   OPT, dropout 0.5, flag on the layers alone: dropout stays off: False
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet transformers==5.24.0 numpy==2.4.6
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"$dir/venv/bin/python" - <<'PY'
import logging, sys, warnings
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig
from transformers.modeling_layers import GradientCheckpointingLayer

ids, notes = torch.arange(16).view(2, 8), []
sys.excepthook = lambda kind, error, trace: sys.stderr.write(f"DIFFERENT FROM WHAT IS STATED: {error!r}\n")
logging.getLogger("transformers").handlers[0].addFilter(notes.append)  # keeps messages, prints none
warnings.showwarning = lambda message, *rest: notes.append(message)

gpt2 = GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                  eos_token_id=0, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
llama = LlamaConfig(intermediate_size=32, **sizes)
opt = OPTConfig(ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=8, dropout=0.5, **sizes)

def check(ok, what):
    if not ok:
        sys.exit(f"DIFFERENT FROM WHAT IS STATED: {what}")

def run(config, mode, **options):  # calls of the first MLP, gradients, logits, messages
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.gradient_checkpointing_enable()
    check(model.is_gradient_checkpointing, "the model says that checkpointing is on")
    model.train(mode == "train")
    calls = []
    for name, module in model.named_modules():
        if mode == "layers" and isinstance(module, GradientCheckpointingLayer):
            module.training = True
        if name.endswith(".0.mlp"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    notes.clear()
    logits = model(ids, **options).logits
    logits.pow(2).mean().backward()
    return len(calls), [p.grad for p in model.parameters()], logits, list(notes)

check(not run(gpt2, "eval")[3] + run(llama, "eval")[3], "eval mode does not warn")
check(run(gpt2, "train")[3], "train mode warns about the cache, which shows that we would see a warning")
for name, config in (("GPT-2", gpt2), ("Llama", llama)):
    e, t, l = (run(config, mode, use_cache=False) for mode in ("eval", "train", "layers"))
    same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(e[1], t[1], l[1]))
    print(f"{name}: eval {e[0]}, train {t[0]}, flag on the layers alone {l[0]}; gradients equal: {same}")
    check((e[0], t[0], l[0], same) == (1, 2, 2, True), f"{name}: eval 1, train 2, layers 2, equal gradients")
gpt2.resid_pdrop = 0.5
for name, config, stays_off in (("GPT-2", gpt2, True), ("OPT", opt, False)):
    e, l = (run(config, mode, use_cache=False)[2] for mode in ("eval", "layers"))
    print(f"{name}, dropout 0.5, flag on the layers alone: dropout stays off: {torch.equal(e, l)}")
    check(torch.equal(e, l) == stays_off, f"{name}: dropout stays off: {stays_off}")
PY
