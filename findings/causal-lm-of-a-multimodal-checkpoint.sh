#!/usr/bin/env bash
# transformers 5.24.0: AutoModelForCausalLM drops one model's vision part and keeps another's.
#
# Setting: two checkpoints of image-and-text models, as save_pretrained writes them.
#   Each is loaded with AutoModelForCausalLM and saved again.
# Guess: both are treated alike. If weights are left out, unexpected_keys lists them.
# Instead: Gemma 3 is loaded whole, vision tower included.
#   Qwen3.5 becomes its text model. Its vision weights are left out.
#   unexpected_keys is empty, no message is given, and the saved copy reads text only.
#
# Output (weights before, weights after, unexpected keys, messages, class after saving):
#   Gemma3ForConditionalGeneration 88 88 0 0 Gemma3ForConditionalGeneration
#   Qwen3_5ForConditionalGeneration 77 56 0 0 Qwen3_5ForCausalLM
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0
"$dir/venv/bin/pip" install --quiet transformers==5.24.0 numpy==2.4.6
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" WORK="$dir"
"$dir/venv/bin/python" - 2>"$dir/stderr" <<'PY' || { cat "$dir/stderr"; exit 1; }
import json, logging, os
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import Gemma3Config, Qwen3_5Config

notes = []
logging.getLogger("transformers").handlers[0].addFilter(notes.append)  # keeps messages, prints none
text = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4)
text |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
linear = dict(linear_num_key_heads=2, linear_num_value_heads=2)
linear |= dict(linear_key_head_dim=16, linear_value_head_dim=16)
vision = dict(hidden_size=32, intermediate_size=64)
tower = dict(num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
blocks = dict(depth=1, num_heads=2, out_hidden_size=32, num_position_embeddings=16)
gemma = Gemma3Config(text_config=text, vision_config=vision | tower, mm_tokens_per_image=4)
qwen = Qwen3_5Config(text_config=text | linear, vision_config=vision | blocks)
seen = []
for config in (gemma, qwen):
    before, after = (Path(os.environ["WORK"], config.model_type, part) for part in ("a", "b"))
    AutoModelForImageTextToText.from_config(config).save_pretrained(before)
    notes.clear()
    model, loaded = AutoModelForCausalLM.from_pretrained(before, output_loading_info=True)
    messages = len(notes)
    model.save_pretrained(after)
    weights = [len(load_file(folder / "model.safetensors")) for folder in (before, after)]
    names = [json.loads((f / "config.json").read_text())["architectures"][0] for f in (before, after)]
    seen.append((names[0], *weights, len(loaded["unexpected_keys"]), messages, names[1]))
    print(*seen[-1])
assert seen == [
    ("Gemma3ForConditionalGeneration", 88, 88, 0, 0, "Gemma3ForConditionalGeneration"),
    ("Qwen3_5ForConditionalGeneration", 77, 56, 0, 0, "Qwen3_5ForCausalLM"),
], f"DIFFERENT FROM WHAT IS STATED: {seen}"
PY
