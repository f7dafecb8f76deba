"""Every place where code of this family goes wrong, pinned. All: pytest -m "slow or not slow"."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import timeit
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock

# No test reaches a hub; one thread each, also in a process of its own, is steady on a busy machine.
os.environ |= dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils import parameters_to_vector
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import PreTrainedTokenizerFast, Qwen3_5Config

import repo
import run_tiny
from repo import Config, RepoError, boxed_reward, encode_prompt

DEVICE = repo.Run.device  # CUDA, where there is one
cases = pytest.mark.parametrize
transformers.utils.logging.disable_progress_bar()

# --------------------------------------------------------------------------------------- helpers


def rows(table):
    """The rows of a table, a line each or with ‖ between them; ⏎ stands for a line break."""
    lines = " ‖ ".join(table.strip().splitlines()).replace("⏎", "\n")
    return [row.split(" | ") for row in lines.split(" ‖ ")]


def table(text):
    """A case for each row of a table, whose first row names the columns."""
    names, *values = rows(text)
    return cases(names, values)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def refused(message):
    """The block ends in a RepoError that says this."""
    return pytest.raises(RepoError, match=message)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template=CHAT, eos="<|im_end|>", frame="$A", blank=False):
    """Any text, a token a byte. `frame` and `blank` are what it puts around a text itself."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(dict(zip(letters, range(256))), []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    core.decoder = decoders.ByteLevel()
    specials = "<|im_start|> <|im_end|> <|eos|> <|bos|>".split()
    core.add_special_tokens(specials)
    core.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(token, core.token_to_id(token)) for token in specials]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
SHAPE |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
SHAPE |= dict(bos_token_id=None, eos_token_id=None)


def tiny_model(kind="llama", vocab=300, seed=0, scale=2.0, **settings):
    """A random model of two layers. `scale` sharpens its distribution."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **SHAPE | dict(vocab_size=vocab) | settings)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        weight.data *= scale
    return model.to(DEVICE).eval()


CFG = Config(group_size=4, batch_size=3, max_new_tokens=12, learning_rate=1e-3)
PROBLEMS = [
    dict(question=f"What is {n} + {n}?", knowledge=f"\\boxed{{{2 * n}}}, by k.", answer=str(2 * n))
    for n in range(1, 10)
]


def completion(prompt, tokens, text="", **more):
    """A completion of no problem."""
    return repo.Completion({}, prompt, tokens, text, **more)


def token_logps(model, completions, temperature):
    """Those of all completions in one tensor."""
    return torch.cat(repo.token_logps(model, completions, temperature))


def random_groups(seed=0):
    """Groups of three of unequal lengths with graded rewards; the last one has no signal.

    All end in token 0, which is the padding too.
    """
    draw = random.Random(seed)

    def ids(longest):
        return draw.choices(range(250), k=draw.randint(1, longest)) + [0]

    prompts = [ids(9) for _ in range(4)]
    groups = [[completion(prompt, ids(12)) for _ in range(3)] for prompt in prompts]
    for o in sum(groups[:-1], []):
        o.reward = draw.random()
    return groups


def assert_close(a, b):
    """Each element on the CPU; where logits are bf16, the whole in relative L2 norm."""
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (a, b))
    if DEVICE == "cpu":
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    else:
        assert a.shape == b.shape and (a - b).norm() <= 0.03 * b.norm()


def all_weights(model):
    """All weights in one vector, a copy."""
    return parameters_to_vector(model.parameters()).detach()


def update(model, optimizer, groups, cfg=CFG, reference=None):
    """Step 4 as a whole; returns its metrics."""
    repo.assign_advantages(groups)
    return repo.update(model, optimizer, groups, cfg, reference)


def gradients(model):
    """The gradients of all weights in one vector, a copy."""
    return parameters_to_vector(weight.grad for weight in model.parameters())


def gradient(model, groups, update=update, **changes):
    """The gradient of an update, not clipped."""
    seen, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    update(model, optimizer, groups, replace(CFG, max_grad_norm=1e9, **changes))
    [grad] = seen
    return grad


def gradient_of(model, loss):
    """The gradient of a loss computed by a test."""
    model.zero_grad()
    loss.backward()
    return gradients(model)


def reinforce(model, groups):
    """`gradient` by hand: Σ A log π / (N |o|), one completion at a time, without padding."""
    loss, count = 0.0, sum(map(len, groups))
    for group in groups:
        rewards = np.array([o.reward for o in group])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for o, advantage in zip(group, advantages):
            logps = token_logps(model, [o], 1.0)
            loss = loss - advantage * logps.sum() / (count * len(o.tokens))
    return gradient_of(model, loss)


def step(reward_fn=boxed_reward, model=None, tokenizer=None, problems=PROBLEMS[:3], **changes):
    """A whole step of a tiny model."""
    model, tokenizer = model or tiny_model(), tokenizer or byte_tokenizer()
    optimizer, cfg = torch.optim.AdamW(model.parameters(), 1e-3), replace(CFG, **changes)
    return repo.train_step(model, tokenizer, optimizer, problems, cfg, reward_fn)


def graded(text, answer):
    """A reward that most groups have several values of."""
    return len(set(text))


@pytest.fixture
def scripted(monkeypatch):
    """A sampler that writes `rollout` for q and `rephrase` for P(q,k); notes its calls."""
    tokenizer, calls = byte_tokenizer(), []

    def script(rollout="no idea<|im_end|>", rephrase="So it is \\boxed{%s}.<|im_end|>"):
        def sample(model, prompts, num_samples, max_new_tokens, temperature, ends):
            calls.append((len(prompts), temperature))
            drawn = []
            for prompt in prompts:
                turn = tokenizer.decode(prompt)
                [problem] = [p for p in PROBLEMS if p["question"] in turn]
                text = rephrase if problem["knowledge"] in turn else rollout
                ids = tokenizer(text.replace("%s", problem["answer"])).input_ids
                logps = token_logps(model, [completion(prompt, ids)], temperature or 1.0)
                drawn += [(ids, logps.tolist())] * num_samples
            return drawn

        monkeypatch.setattr(repo, "sample", sample)
        return calls

    return script


def written(name, rows):
    """A file of these rows, in the format of its name."""
    if name.endswith(".parquet"):
        return Dataset.from_list(rows).to_parquet(name)
    records = [rows] if name.endswith(".json") else rows
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def read(path, split="train", q="q", k="k", a="a"):
    """The problems of a file."""
    run = repo.Run("m", path, "o", question_column=q, knowledge_column=k, answer_column=a)
    return repo.load_problems(run, split)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return run_tiny.codebooks(0, tmp_path_factory.mktemp("world"), DEVICE)


@pytest.fixture(scope="module")
def files(world, tmp_path_factory):
    """The miniature's base policy, as save_pretrained wrote it, and GSM8K-shaped data for it."""
    folder, rows = tmp_path_factory.mktemp("files"), []
    for problem in world.problems:
        solution = problem["knowledge"].replace("\\boxed{", "\n#### ").rstrip("}")
        rows.append(dict(question=problem["question"], answer=solution))
    written(f"{folder}/data.jsonl", rows)
    (folder / "model").symlink_to(world.model)
    return folder


def flags(files, folder="out", **changes):
    """The command line of a small run."""
    line = f"""
        --model={files}/model --dataset={files}/data.jsonl --out={folder} --steps=4 --batch_size=4
        --group_size=4 --max_new_tokens=20 --learning_rate=1e-3 --device=cpu
        --question_prompt={{question}} --rephrase_prompt={{question}}?{{knowledge}}
    """
    return line.split() + [f"--{name}={value}" for name, value in changes.items()]


def lines(out="out", name="metrics.jsonl"):
    """The rows of a file of a run, without what depends on the clock."""
    made = map(json.loads, Path(out, name).read_text().splitlines())
    return [{key: row[key] for key in row if "seconds" not in key} for row in made]


def outcome(out):
    """What a run has come to: its weights, metrics and episodes."""
    weights = Path(out, "model/model.safetensors").read_bytes()
    return weights, lines(out), lines(out, "episodes.jsonl")


def refusal(argv):
    """The one line in which a command ends; its reward for a failure is not 0."""
    with pytest.raises(SystemExit) as stop:
        repo.main(argv, lambda *pair: boxed_reward(*pair) or -1)
    [line] = str(stop.value).splitlines()
    return line


def saved(model, tokenizer=None, folder="saved"):
    """The folder of a checkpoint."""
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------- settings


@table("""
name | value
group_size | 1 ‖ batch_size | 0 ‖ max_new_tokens | 0 ‖ updates_per_batch | 0
gate_threshold | 1.5 ‖ gate_threshold | -0.1 ‖ gate_threshold | NaN ‖ micro_batch_tokens | 0
fail_threshold | 0.0 ‖ fail_threshold | 1.1 ‖ temperature | 0.0 ‖ temperature | NaN
rephrase_temperature | -0.1 ‖ clip_epsilon | -0.2 ‖ kl_beta | -0.1 ‖ learning_rate | 0.0
max_grad_norm | 0.0 ‖ guidance | "verbtim" ‖ rephrase_prompt | "{question}"
question_prompt | "{knowledge}" ‖ question_prompt | "{question} {knowledge}"
""")
def test_settings_with_which_nothing_is_learnt_are_refused(name, value):
    with refused(name):
        Config(**{name: json.loads(value)})


def test_every_setting_says_whose_it_is():
    whose = "(paper|reported|ours)"
    for field in fields(Config):
        assert re.search(rf"\[{whose}, {whose}\]$", field.metadata["help"])


# ------------------------------------------------------------------------------- text and tokens


def test_the_prompt_of_a_base_model_ends_in_a_line_break():
    plain = byte_tokenizer(None, eos="<|eos|>", frame="<|bos|> $A <|eos|>")
    assert plain.decode(encode_prompt(plain, "hi")) == "<|bos|>hi\n\nSolution:\n"


@cases("template", [CHAT, None])
def test_text_that_looks_like_a_control_token_stays_text(template):
    tokenizer = byte_tokenizer(template, frame="<|bos|> $A")  # BOS: prompts only
    text = "a<|im_end|>\n<|im_start|>assistant\nb"
    prompt = encode_prompt(tokenizer, text)
    answer = repo.encode_answer(tokenizer, text, tokenizer("A").input_ids[-1])
    assert text in tokenizer.decode(prompt)
    assert tokenizer.decode(answer) == text
    for special in tokenizer.convert_tokens_to_ids("<|im_end|> <|im_start|> <|bos|>".split()):
        assert prompt.count(special) == encode_prompt(tokenizer, "").count(special)
        assert special not in answer


CONTENT = "{{ m['content'] }}"
ASSISTANT = "{% for m in messages %}{{ m['role'] }}: " + CONTENT + "\n{% endfor %}"
THINK = CHAT + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
FAULTS = {
    "drops the user": CHAT.replace(CONTENT, ""),
    "drops a letter": CHAT.replace(CONTENT, "{{ m['content'][1:] }}"),
    "raises": CHAT.replace(CONTENT, "{{ raise_exception('no') }}"),
    "wants parts": CHAT.replace(CONTENT, "{% for part in m.content %}{{ part.text }}{% endfor %}"),
    "answers in channels": CHAT.replace(CONTENT, "{{ 'final' if m.role != 'user' }}" + CONTENT),
    "drops the assistant": "Q: {{ messages[0]['content'] }} A:",
    "has no generation prompt": ASSISTANT,
    "opens thoughts": THINK,
}


@cases("fault", FAULTS)
def test_a_template_under_which_a_rephrase_would_stand_elsewhere_is_refused(fault):
    with refused("the chat template"):
        step(tokenizer=byte_tokenizer(FAULTS[fault]))
    with refused("the chat template"):
        repo.load_model(saved(tiny_model(), byte_tokenizer(FAULTS[fault])), DEVICE)


def test_a_model_that_can_answer_without_thoughts_is_asked_to():
    close = "{% if enable_thinking is false %}{{ '\n</think>\n' }}{% endif %}{% endif %}"
    tokenizer = byte_tokenizer(THINK.removesuffix("{% endif %}") + close)
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")).endswith("<think>\n\n</think>\n")
    step(tokenizer=tokenizer)


def test_todays_date_is_no_part_of_a_prompt_that_takes_one():
    dated = byte_tokenizer("{{ date_string or strftime_now('%d') }}" + CHAT)
    assert dated.decode(encode_prompt(dated, "")).startswith("1 Jan")


def metaspace_tokenizer(template):
    """A tokenizer that puts a blank before a text, as those of SentencePiece do."""
    pieces = ["<unk>", "<s>", "</s>", "\n", "▁", *"abcdefghijklmnopqrstuvwxyzASTIis.:!,"]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(dict.fromkeys(pieces))}, []))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


@cases("blank", ["", " "])
@cases("make", [metaspace_tokenizer, lambda t: byte_tokenizer(t, "<|eos|>", blank=True)])
def test_an_injected_text_begins_with_the_token_of_a_rollout(make, blank, monkeypatch):
    """With a blank or not, cut or not, rephrase or expert, whatever a text alone begins with."""
    tokenizer = make(ASSISTANT + "{% if add_generation_prompt %}assistant:{% endif %}")
    vocabulary, end = tokenizer.get_vocab(), [tokenizer.eos_token_id]
    marks = str.maketrans({" ": "▁"} if "▁" in vocabulary else {" ": "Ġ", "\n": "Ċ"})

    def ids(text):
        return [vocabulary[letter] for letter in (blank + text).translate(marks)]

    def write(draft, knowledge):
        drawn = [[(ids("is it") + end, [0.0])] * 2, [(ids(draft) + end, [0.0])]]
        monkeypatch.setattr(repo, "sample", lambda *_: drawn.pop(0))
        problem = dict(question="a", knowledge=knowledge, answer="")
        cfg = replace(CFG, group_size=2, rephrase_prompt="{knowledge}")
        [group] = repo.rollout(tiny_model(), tokenizer, [problem], 2, 1.0, cfg, lambda *_: 0)
        [o_rep] = repo.rephrase(tiny_model(), tokenizer, [group], cfg)
        [expert] = repo.expert_completions(tiny_model(), tokenizer, group)[:1]
        assert o_rep.prompt is expert.prompt is group[0].prompt
        return o_rep.tokens, expert.tokens

    assert write("It is so.", "It is a.") == (ids("It is so.") + end, ids("It is a.") + end)
    assert write("Sure!\nIt is so.", "So.")[0] == ids("It is so.") + end


def test_an_answer_ends_as_the_chat_template_ends_it():
    model, tokenizer = tiny_model(), byte_tokenizer(eos="<|eos|>")  # two ends, as Gemma and Phi
    model.generation_config.eos_token_id = [7]
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eos|>"]) + [7]
    assert repo.end_tokens(model, tokenizer) == ends
    _, groups, _ = step(model=model, tokenizer=tokenizer, guidance="verbatim")
    assert tokenizer.decode(groups[0][0].tokens).endswith("k.<|im_end|>")
    assert repo.end_tokens(model, byte_tokenizer(None, eos="<|eos|>")) == ends[1:]


def test_without_any_end_token_nothing_is_trained():
    with refused("no token ends an answer"):
        step(tokenizer=byte_tokenizer(None, eos=None))


def test_a_blank_token_after_an_answer_is_not_its_end():
    tokenizer = byte_tokenizer(CHAT.replace("<|im_end|>", "\n\n<|im_end|>"))
    tokenizer.add_tokens(["\n\n"])
    assert repo.end_tokens(tiny_model(), tokenizer)[0] == tokenizer.eos_token_id


def test_templates_are_filled_in_whatever_braces_the_texts_hold():
    problem = dict(question="Is {knowledge} \\frac{1}{2}?", knowledge="{question}")
    filled = "Is {knowledge} \\frac{1}{2}?|{question}|{}|{other}"
    assert repo.fill("{question}|{knowledge}|{}|{other}", problem) == filled


# -------------------------------------------------------------------------------------- sampling


def test_samples_follow_exactly_the_softmax():
    """Chi-square over two-token completions; the generation_config would cut and penalise."""
    model, count = tiny_model(vocab=6), 12_000
    model.generation_config.update(top_k=2, top_p=0.5, repetition_penalty=3.0, do_sample=True)
    prompts = [[1], [2, 3, 4, 5, 1, 2, 3]]
    torch.manual_seed(1)
    drawn = repo.sample(model, prompts, count, 2, 0.7, [])
    for n, prompt in enumerate(prompts):
        ids = torch.tensor([prompt + [first] for first in range(6)], device=DEVICE)
        logits = model(ids).logits[:, -2:].detach().double().cpu()
        p = (logits / 0.7).softmax(-1).numpy()  # [first token, place, token]
        expected = count * p[0, 0, :, None] * p[:, 1]
        seen = np.zeros((6, 6))
        for ids, _ in drawn[n * count : (n + 1) * count]:
            seen[tuple(ids)] += 1
        chi2 = ((seen - expected) ** 2 / expected).sum()
        assert chi2 < 36 + 5 * 72**0.5  # 5 deviations


FAMILIES = dict(llama={}, gemma2=dict(sliding_window=4))
FAMILIES["gpt2"] = dict(n_embd=32, n_layer=2, n_head=4, n_positions=600)  # with learned positions
FAMILIES["lfm2"] = dict(layer_types=["conv", "full_attention"])
# Linear attention, with heads in two numbers:
FAMILIES["qwen3_5_text"] = dict(num_hidden_layers=4, linear_key_head_dim=8, linear_value_head_dim=8)
FAMILIES["qwen3_5_text"] |= dict(linear_num_key_heads=2, linear_num_value_heads=4)
MINIMAX = dict(num_local_experts=4, layer_types=["linear_attention", "full_attention"])
DROPOUT = {kind: dict(attention_dropout=0.5) for kind in ("llama", "qwen3")}
DROPOUT["gpt2"] = FAMILIES["gpt2"] | dict(resid_pdrop=0.5, attn_pdrop=0.5)
SAME = 1e-4 if DEVICE == "cpu" else 0.5  # two code paths, a token's difference in nats


@cases("kind", FAMILIES)
def test_sampler_and_trainer_agree_on_unlike_models_and_unequal_prompts(kind):
    model = tiny_model(kind, vocab=40, scale=3.0, **FAMILIES[kind])
    prompts = [[3, 4, 5, 6, 7, 8], [9], [11, 12, 13]]
    torch.manual_seed(0)
    drawn = repo.sample(model, prompts, 4, 12, 0.8, [2, 5])
    made = [completion(prompts[i // 4], ids) for i, (ids, _) in enumerate(drawn)]
    assert len({len(o.tokens) for o in made}) > 2
    for ids, logps in drawn:
        assert not {2, 5} & set(ids[:-1])
        assert len(logps) == len(ids) <= 12
        assert len(ids) == 12 or ids[-1] in (2, 5)
    sampled = torch.tensor([logp for _, logps in drawn for logp in logps])
    assert (token_logps(model, made, 0.8).cpu() - sampled).abs().max() < SAME
    greedy = repo.sample(model, prompts, 1, 12, 0.0, [2])
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    for prompt, (ids, _) in zip(prompts, greedy):
        library = model.generate(torch.tensor([prompt], device=DEVICE), **options)
        assert DEVICE == "cuda" or library[0, len(prompt) :].tolist() == ids


@cases("kind, settings", [("mamba", {}), ("rwkv", {}), ("minimax", MINIMAX)])
def test_a_model_whose_cache_cannot_be_rearranged_is_refused_before_it_is_trained(kind, settings):
    """Without a cache or with one of its own at once; else by the log-probabilities."""
    model = tiny_model(kind, scale=3.0, **settings)
    before = all_weights(model)
    with refused("rearranged"):
        step(graded, model)
    assert torch.equal(before, all_weights(model))


@cases("temperature", [1.0, 0.2])
def test_a_sampler_of_another_temperature_is_stopped(temperature, monkeypatch):
    step(graded, tiny_model(scale=4.0), temperature=temperature)
    sample = repo.sample  # model, prompts, number, length, temperature, ends
    monkeypatch.setattr(repo, "sample", lambda *given: sample(*given[:4], 0.3 * given[4], given[5]))
    with refused("nats a token apart"):
        step(graded, tiny_model(scale=4.0), temperature=temperature)


def test_sampler_and_trainer_may_differ_by_what_rounding_in_bf16_explains():
    foreign, o = completion([1], [2], old_logps=[-9.0]), completion([1], [2] * 300)
    o.old_logps, o.sampler_logps = [0.0] * 300, [0.022] * 299 + [-2.4]
    assert repo.check_sampler([foreign]) is None
    assert repo.check_sampler([foreign, o]) == 2.4
    for worst in (-60.0, math.nan):
        o.sampler_logps[7] = worst
        with refused("nats a token apart"):
            repo.check_sampler([foreign, o])


def test_a_card_that_only_emulates_bf16_computes_in_fp32(monkeypatch):
    strict = dict(including_emulation=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **asked: asked != strict)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: enabled)
    assert not repo.autocast()


# ------------------------------------------------------------ advantages, log-probabilities, loss


def test_advantages_against_numpy_and_exactly_zero_for_equal_rewards():
    rewards = np.random.default_rng(0).random((4, 8))
    rewards *= [[1.0], [1e-4], [1e-6], [100.0]]  # where the 1e-6 shows
    deviation = rewards.std(1, ddof=1, keepdims=True) + 1e-6
    expected = (rewards - rewards.mean(1, keepdims=True)) / deviation
    np.testing.assert_allclose([*map(repo.group_advantages, rewards.tolist())], expected)
    for size in range(2, 40):
        for reward in (0.0, 0.1, 1 / 3, 1e9):  # a mean in floats would round
            assert not any(repo.group_advantages([reward] * size))


@cases("size", [2, 3, 8, 64])
def test_what_an_injection_is_worth_as_the_head_derives_it(size):
    """(G-1)/√G for o_rep and -1/√G for each of the failures beside it."""
    rewards = [1.0] + [0.0] * (size - 1)
    expected = (size * np.array(rewards) - 1) / size**0.5
    np.testing.assert_allclose(repo.group_advantages(rewards), expected, rtol=1e-5)


def test_token_logps_against_numpy_one_sequence_at_a_time():
    model, completions, expected = tiny_model(), sum(random_groups(), []), []
    for o in completions:
        ids = torch.tensor([o.ids], device=DEVICE)
        logits = model(ids).logits[0].detach().double().cpu().numpy() / 0.7
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected += [logp[len(o.prompt) - 1 + t, i] for t, i in enumerate(o.tokens)]
    assert_close(token_logps(model, completions, 0.7), expected)


@cases("advantage", [1.5, -0.7])
def test_loss_and_gradient_against_numpy_on_both_sides_of_the_clip(advantage):
    logps, old = np.random.default_rng(0).normal(0, 0.4, (2, 200))
    leaf = torch.tensor(logps, requires_grad=True)
    loss, clipped = repo.policy_loss(leaf, torch.tensor(old), advantage, 0.2)
    loss.backward()
    ratio = np.exp(logps - old)
    # Too far already, it may not push on; it may pull back.
    acts = ratio > 1.2 if advantage > 0 else ratio < 0.8
    bounded = np.where(acts, np.clip(ratio, 0.8, 1.2), ratio)
    np.testing.assert_allclose(loss.item(), -(advantage * bounded).mean())
    np.testing.assert_allclose(leaf.grad, np.where(acts, 0, -advantage * ratio) / 200, atol=1e-14)
    assert (clipped.numpy() == acts).all() and 0.1 < acts.mean() < 0.9


@cases("far", [-100.0, 100.0])
@cases("advantage", [1, -1])
def test_kl_is_the_k3_estimator_and_no_log_ratio_makes_a_gradient_infinite(far, advantage):
    d, zeros = torch.tensor([1.0, 30.0, far], requires_grad=True), torch.zeros(3)
    loss, _ = repo.policy_loss(d, zeros, advantage, 0.2)
    (loss + repo.kl_loss(-d, zeros)).backward()  # 0 x inf would be NaN
    assert 3 * d.grad[2] == -(far < 0)  # none beyond the bound
    near = d[:2].detach()
    ratio = near.exp()
    torch.testing.assert_close(repo.kl_loss(-near, zeros[:2]), (ratio - near - 1).mean())
    torch.testing.assert_close(3 * d.grad[:2], ratio - 1 + (advantage < 0) * ratio)


@cases("micro_batch_tokens", [10_000, 60, 25, 1])
def test_the_first_update_is_reinforce_for_every_micro_batch_size(micro_batch_tokens):
    """Whatever the clip is and the sampler said: the ratio is exactly 1. All groups count."""
    model, groups = tiny_model(), random_groups()
    for o in groups[0]:
        o.sampler_logps = (token_logps(model, [o], 1.0).detach() + 0.09).tolist()
    seen = gradient(model, groups, clip_epsilon=1e-6, micro_batch_tokens=micro_batch_tokens)
    assert_close(seen, reinforce(model, groups))


def test_micro_batches_keep_to_their_size_and_the_longest_come_first():
    completions = sum(random_groups(), [])
    lengths = [[len(o.ids) for o in batch] for batch in repo.micro_batches(completions, 50)]
    assert all(len(batch) * max(batch) <= 50 for batch in lengths)
    assert max(lengths[0]) == max(map(max, lengths))


def test_logits_are_computed_from_the_first_completion_on_and_used_only_for_completions():
    """A NaN at each place without a completion token would show in any softmax taken there."""
    model = tiny_model(vocab=3000)
    completions = [completion([1] * 40, [2] * 5), completion([1] * 42, [2] * 4)]
    poison = torch.full((2, 7, 1), math.nan, device=DEVICE)  # of 46 places
    poison[0, :5] = poison[1, 2:6] = 0

    def poisoned(module, inputs, output):
        assert output.shape == (2, 7, 3000)
        return output + poison

    model.lm_head.register_forward_hook(poisoned)
    assert gradient_of(model, token_logps(model, completions, 1.0).sum()).isfinite().all()


def test_dropout_and_train_mode_do_not_move_the_ratio():
    metrics, _, _ = step(graded, tiny_model("gpt2", **DROPOUT["gpt2"]).train())
    assert metrics["sampler_logp_diff"] < SAME and metrics["clip_ratio"] == 0


@cases("kind", DROPOUT)
def test_checkpointed_layers_are_computed_twice_and_nothing_else_changes(kind):
    """The library's switch alone would compute them once, and train mode would drop out."""
    seen = []
    for saving in (False, True):
        model, calls = tiny_model(kind, **DROPOUT[kind]), []
        inner = next(module for name, module in model.named_modules() if name.endswith("mlp"))
        hook = inner.register_forward_pre_hook(lambda *_: calls.append(1))
        grad = gradient(model, random_groups(), checkpoint_layers=saving)
        assert len(calls) == 1 + saving
        hook.remove()
        metrics, groups, _ = step(graded, model, checkpoint_layers=saving)
        assert metrics["clip_ratio"] == 0 and metrics["sampler_logp_diff"] < SAME
        seen.append((grad, torch.tensor(groups[0][0].sampler_logps)))
    for plain, saved in zip(*seen):
        assert_close(plain, saved)


def test_a_callers_autocast_does_not_keep_the_old_weights():
    model = tiny_model()
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        update(model, torch.optim.SGD(model.parameters(), lr=10.0), random_groups())
        inside = token_logps(model, random_groups()[0], 1.0)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        assert torch.equal(inside, token_logps(model, random_groups()[0], 1.0))


def test_later_updates_use_the_first_passes_log_probabilities():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = update(model, optimizer, random_groups(), replace(CFG, updates_per_batch=4))
    assert metrics["clip_ratio"] > 0.1  # with a fresh π_old each time it would stay 0


def test_the_kl_term_pulls_toward_the_reference_also_without_any_advantage():
    model, reference = tiny_model(), tiny_model(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    rest = random_groups()[-1:], replace(CFG, kl_beta=1.0), reference
    metrics = [update(model, optimizer, *rest) for _ in range(15)]
    assert metrics[-1]["kl"] < 0.5 * metrics[0]["kl"]
    weaker = update(tiny_model(), optimizer, rest[0], replace(CFG, kl_beta=0.1), reference)
    assert_close(10 * weaker["grad_norm"], metrics[0]["grad_norm"])
    with refused("kl_beta is 1.0 and there is no reference"):
        step(kl_beta=1.0)


def test_a_batch_without_signal_changes_nothing_not_even_by_momentum():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    update(model, optimizer, random_groups())
    before = all_weights(model)
    assert update(model, optimizer, random_groups()[-1:])["grad_norm"] is None
    assert torch.equal(before, all_weights(model))


def test_a_step_that_stops_moves_no_weight_and_leaves_no_gradient(monkeypatch):
    stopped, fresh = tiny_model(), tiny_model()
    optimizer = torch.optim.SGD(stopped.parameters(), 1.0)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="non-finite"):
        patch.setattr(repo, "policy_loss", lambda logps, *_: (math.inf * logps.sum(), logps > 0))
        update(stopped, optimizer, random_groups(1))
    assert torch.equal(all_weights(stopped), all_weights(fresh))
    assert_close(gradient(stopped, random_groups()), gradient(fresh, random_groups()))


# --------------------------------------------------------------------------- gate and replacement


@table("""
rewards | rho | opens
0 0 0 0 | 1 | open ‖ 0 0 0 1 | 1 | closed ‖ 0 0 0 1 | 0.75 | open ‖ 0 0 1 1 | 0.75 | closed
0.5 0.5 | 0.5 | closed ‖ 0.49 0.5 | 0.5 | open ‖ 1 1 | 0 | open
""")
def test_the_gate(rewards, rho, opens):
    group = [completion([1], [2], reward=float(reward)) for reward in rewards.split()]
    assert repo.gate_opens(group, replace(CFG, gate_threshold=float(rho))) == (opens == "open")


def test_the_first_of_the_lowest_is_replaced_as_a_whole_and_only_by_a_better_guide():
    kept = [completion([1], [i], reward=r) for i, r in enumerate([0.2, 0.1, 0.9, 0.1])]
    group = list(kept)
    repo.replace_worst(group, completion([1], [9], "guide", reward=0.1))
    assert group == kept
    guide = completion([1], [7, 8], "guide", reward=0.11)
    repo.replace_worst(group, guide)
    assert guide.replaced is kept[1]
    assert group[1] is guide and group == [kept[0], guide, *kept[2:]]


# ------------------------------------------------------------------------------------ whole steps


def test_repo_trains_the_cleaned_rephrase_under_the_plain_question_where_all_failed(scripted):
    meta = "Sure, here is the rephrased solution:\n"
    calls = scripted("%s\\boxed{2}<|im_end|>", meta + "So it is \\boxed{%s}.<|im_end|>")
    model, tokenizer = tiny_model(), byte_tokenizer()
    metrics, groups, guides = step(model=model, temperature=0.8)
    assert calls == [(3, 0.8), (2, 0.0)]  # the first question is solved
    assert metrics["injections"] == 2 and metrics["rephrase/success"] == 1
    assert metrics["reward"] == 1 / 3 and metrics["kl"] is None  # of the policy's own texts
    for problem, group, guide in zip(PROBLEMS[1:], groups[1:], guides):
        assert group[0] is guide and [o.reward for o in group] == [1, 0, 0, 0]
        question = repo.fill(CFG.question_prompt, problem)
        assert all(o.prompt == encode_prompt(tokenizer, question) for o in group)
        assert guide.text == f"So it is \\boxed{{{problem['answer']}}}."
        assert guide.draft.text == meta + guide.text
        assert tokenizer.decode(guide.tokens) == guide.text + "<|im_end|>"
    assert metrics["completions/mean_length"] == 11
    assert metrics["completions/clipped_ratio"] == metrics["rephrase/clipped_ratio"] == 0
    replaced = [guide.replaced for guide in guides]
    texts = dict(rephrase=guides, draft=[guide.draft for guide in guides], rollout=replaced)
    texts["expert"] = repo.expert_completions(model, tokenizer, replaced)
    for kind in texts:  # all under the policy before the update; a greedy draft counts at 1
        expected = token_logps(tiny_model(), texts[kind], 1.0 if kind == "draft" else 0.8).mean()
        assert_close(metrics[f"logp/{kind}"], expected)


def test_only_injected_questions_are_compared(scripted):
    """The rephrase of one of three questions is wrong: its texts count in no logp."""
    scripted("no idea<|im_end|>", "\\boxed{%s}<|im_end|>")
    problems = [PROBLEMS[0], dict(PROBLEMS[1], answer="5"), PROBLEMS[2]]
    metrics, _, guides = step(problems=problems)
    let_in = [guide for guide in guides if guide.replaced]
    assert len(let_in) == metrics["injections"] == 2
    experts = repo.expert_completions(tiny_model(), byte_tokenizer(), [o.replaced for o in let_in])
    for kind, texts in (("rephrase", let_in), ("expert", experts)):
        assert_close(metrics[f"logp/{kind}"], token_logps(tiny_model(), texts, 1.0).mean())


def test_grpo_asks_for_no_rephrase_and_needs_no_knowledge(scripted):
    calls = scripted(rollout="no end")
    metrics, _, _ = step(problems=[dict(question="What is 1 + 1?", answer="2")], guidance="none")
    assert calls == [(1, 1.0)] and metrics["completions/clipped_ratio"] == 1


@table("""
draft | injections
right<|im_end|> | 3
 right <|im_end|> | 3 ‖ right | 0 ‖ wrong<|im_end|> | 0 ‖ right<|im_start|><|im_end|> | 0
So. As the reference solution shows, it is. So<|im_end|> | 0
<think>on and on</think>right<|im_end|> | 0
""")
def test_a_draft_goes_in_as_it_was_drawn_or_not_at_all(scripted, draft, injections):
    """Not if it is wrong, has no end, spells control tokens, or is refused: that is an empty text,
    which stays out even if it is rewarded."""
    scripted(rephrase=draft)
    metrics, groups, guides = step(lambda text, answer: float(text.strip() in ("right", "")))
    assert metrics["injections"] == int(injections)
    assert metrics["rephrase/success"] == (injections == "3")
    assert metrics["rephrase/clipped_ratio"] == ("<|im_end|>" not in draft)
    if injections == "3":
        assert guides[0].tokens == guides[0].draft.tokens == byte_tokenizer()(draft).input_ids
    else:
        assert metrics["grad_norm"] is None
        assert {o.text for group in groups for o in group} == {"no idea"}


def test_the_experts_text_is_rewarded_only_where_it_is_the_guide(scripted):
    scripted()
    has_box = Mock(side_effect=lambda text, answer: float("box" in text))
    step(has_box)
    assert PROBLEMS[0]["knowledge"] not in [call.args[0] for call in has_box.call_args_list]
    _, groups, _ = step(has_box, guidance="verbatim")
    assert [group[0].text for group in groups] == [p["knowledge"] for p in PROBLEMS[:3]]


@table("""
changes
{} ‖ {"group_size": 2, "max_new_tokens": 1} ‖ {"updates_per_batch": 4, "temperature": 0.5}
{"gate_threshold": 0, "guidance": "verbatim"} ‖ {"guidance": "none"}
""")
def test_whole_steps_end_with_finite_metrics(changes):
    changes = json.loads(changes)
    metrics, groups, _ = step(lambda text, answer: len(text) % 3 / 2, **changes)
    assert all(value is None or math.isfinite(value) for value in metrics.values())
    assert [len(group) for group in groups] == [changes.get("group_size", 4)] * 3


@cases("reward", [math.nan, math.inf, None, "good"])
def test_a_reward_that_is_no_finite_number_names_prompt_and_completion(scripted, reward):
    scripted(rollout="forty-two")
    with refused("(?s)finite number.*What is 1 \\+ 1.*forty-two"):
        step(lambda text, answer: reward)


def test_accuracy_is_the_share_of_right_greedy_answers(scripted):
    calls = scripted(rollout="\\boxed{4}")
    cfg = replace(CFG, batch_size=2, group_size=2)
    assert repo.accuracy(tiny_model(), byte_tokenizer(), PROBLEMS, cfg, boxed_reward) == 1 / 9
    assert calls == [(4, 0.0), (4, 0.0), (1, 0.0)]


# ------------------------------------------------------------------- the reward defines a contract

# gold ✓ texts that are right | ... ✗ texts that are wrong | ... ‖ the next gold
BOXES = rows(r"""
3 ✓ \boxed{4}, no, \boxed{3}, as 4 < 5. | \boxed{\boxed{3}} ✗ \boxed{3 | 3, not \boxed | \boxed{$~$}
3 ✗ \boxed{3} or \boxed{4} | \boxed{3} or \boxed {4} | \boxed{3} \boxed{4 ‖ ✗ \boxed{$~$}
42 ✓ 42 | $42$ | 42. | 42.0 | \frac{84}{2} | 42\% | \text{42} | \$42 | 42^ \circ ✗ \boxed{} | nan
42 ✗ 42 or 43 | 42\text{ or 43} | 42\text{ or more} | 2+40 | -42 | 4 2 | 4\,2 | 4\text{2} | 42x
42 ✗ 42\mathrm{i} | \not=42 | x = 42 | {42} | 42\text{ cm} | 42 cm ‖ x=42 ✗ 42 ‖ nan ✓ nan ✗ 0
1000 ✓ 1,000 | 1{,}000 | 1\,000 | 1\!000 ✗ 1,00 | 1.000 | 1, 000 | 1,\,000 ‖ 12000 ✓ 12\,000
123 ✓ 123 ✗ 0,123 | (12,3) ‖ -5 ✓ −5 | –5 | - 5 | -\frac{10}{2} | \frac{-10}{2} ✗ 5 | --5
60 ✓ 60\% ✗ 0.6 ‖ 5 ✓ \$5 | 5\% ‖ 90 ✓ 90^{\circ} | 90° ‖ 7 ✓ \displaystyle 7 ‖ \pm3 ✓ \pm 3
0.75 ✓ 3/4 | .75 ✗ 4/3 | 3/0 | \frac{3}{4}5 | 0,75 | 0 .75 | \left.75\right. ‖ 0.00001 ✗ 1e-05
0.5 ✓ \tfrac{1}2 | \displaystyle.5 | 0.50 ‖ 0.1000000000000000055511151231257827 ✗ 0.1
1e-05 ✓ 1e-05 ‖ 3 million ✓ 3\text{ million} ‖ 3\text{ million} ✓ 3\text{ million}
3 ✗ 3\text{ million} | 3\mathrm{Million} | \$3\text{ million dollars} | 3\textbf{ million}
3 ✗ 3\text{ m}\text{illion} | 3\text{ US million} | 3\text{ milliard} | 3\text{ billion dollars}
3 ✗ 3\text{ trillion} | 3\text{ thou\text{sand}} | 3\text{k} | 3\text{ M} | 3\mathrm{P}
3 ✗ 3\text{ percentage points} | 3\text{ percent points} | 3\text{ hundredths} | 3\text{ thirds}
3 ✗ 3\text{ sixteenths} | 3\text{ pairs} | 3\text{ times} | 3\text{ factorial} | 3\text{ cm or more}
3 ✗ 3\text{ divided by five} | 3\text{ doz} ‖ 20 ✗ 20\text{ dozen eggs} | 20\text{ half-dozen}
5 ✗ 5\text{ plus two} | 5\text{ choose two} | 5\text{ less} | 5\text{ remainder two}
5 ✗ 5\text{ hours thirty minutes} | 5\text{ out of twelve} ‖ 60^\circ ✗ 60\text{ radians}
2 ✗ 2\text{ root three} | 2\text{ except zero} | 2\text{a} ‖ 0.3 ✗ 0.3\text{ repeating}
101 ✗ 101\text{ binary} | 101_{2} ‖ 25\pi ✗ 25\pi\text{ million} ‖ 3\text{ AM} ✗ 3\text{ PM}
3\text{ m} ✗ 3\text{ km} | 3\text{ m}^2 | x=3\text{ cm} ‖ 3\text{ m}^2 ✓ 3\text{ m}^{2}
3/4 ✗ \frac{3}{4}\text{ million} | \frac{3}{4}\text{ dozen} | -\frac34 | 1\frac34
\frac{3}{4}\text{ million} ✓ \frac34\text{ million} ‖ \frac{3}{4} ✓ \frac34 ‖ -3/4 ✓ -\frac34
3/4 ✓ \frac34 | \frac{3}4 | \dfrac3{4} | \frac 3 4 ‖ 1/2 ✓ \displaystyle\frac{1}{2} ✗ \frac12x
1/12 ✓ \frac1{12} ✗ \frac112 ‖ \frac{1}{23} ✗ \frac123 ‖ 7/4 ✗ 1\frac34 ‖ 4 ✓ \frac{12}3
1\frac{3}{4} ✓ 1\frac34 ‖ 13/4 ✗ 1 3/4 ‖ \frac{1}{2}x ✓ \frac12x ‖ \frac{1}{2x} ✗ \frac12x
\frac{1}{ab} ✓ \tfrac{1}{ab} ✗ 1/ab ‖ \frac{\pi}{2} ✓ \dfrac{\pi}{2} ✗ \frac{2}{\pi}
\sqrt{3} ✓ \sqrt3 ‖ \sqrt{x} ✓ \sqrt x ‖ \sqrt{34} ✗ \sqrt34 ‖ \sqrt{3}4 ✓ \sqrt34
\sqrt{12} ✗ \sqrt12 ‖ 3 ✗ \sqrt3 | \pm3 | (3) | (3,4) ‖ 5 ✗ (3)=5 | \text{NOT}=5 | \displaystyle.5
3 ✗ 3=x | x=y=3 | 2x=3 | \sin(x)=3 | x\le3 | x\ne3 | x\not=3 ‖ x\ge3 ✗ x\le3 ‖ x=3 ✓ x=3
x=4 ✗ x=3 ‖ y=3 ✗ x=3 | x=y=3 ‖ x= ✗ x= ‖ g(x)=x^2 ✗ f(x)=x^2 ‖ 9 ✗ x²=9 | 3^{2}
300 ✗ 3\times10^2 ‖ x^12 ✗ x^{12} ‖ x_10 ✗ x_{10} ‖ x^-1 ✗ x^{-1} ‖ x^{23} ✗ x^{2}3 ‖ a_2 ✓ a_{2}
x^2 ✓ x^{2} ‖ x^2y ✓ x^{2}y ‖ x_1+x_2 ✓ x_{1}+x_{2} ‖ x^2 + \sqrt{2} ✓ x^{2}+\sqrt 2
x^{2}+1 ✓ x^{2} + 1 ✗ x^{2}-1 | 1+x^{2} | X^{2}+1 ‖ a\cdot b ✓ a \cdot b ‖ 3\infty ✗ 3+\infty
B ✓ (B) | B. | B) | \text{B} | \text{(B)} | \textbf{(B)}. ✗ (b) | \sqrt{B} ‖ (B) ✓ B
A ✗ (B) | (A) or (B) | A, B ‖ D ✗ \text{(C)} ‖ AB ✗ (AB) ‖ x ✗ (x) ‖ abc ✗ ABC ‖ X Y Z ✗ x y z
Paris ✓ \text{Paris} | \text{Paris.} | \textit{Paris} ✗ Paris or London | paris ‖ C# ✓ C\#
AABB ✗ AaBb ‖ Co ✗ CO ‖ Na^+ ✓ \text{Na}^+ ‖ \text{Na}^+ ✗ \mathrm{Na}^{+} ‖ C ✓ \text{(C)}
\text{H}_2 ✗ \text{H}_2\text{O} ‖ [1,2] ✗ \not\in[1,2] ‖ y\in[1,2] ✗ x\in[1,2]
(1, 2) ✓ (1,2) | \left( 1, 2 \right) ✗ (2, 1) | (1 2) ‖ [1\\ 2] ✓ [1\\2] ✗ [1 2]
\begin{pmatrix}1\\2\end{pmatrix} ✗ \begin{vmatrix}1\\2\end{vmatrix} ‖ snake_case ✓ snake\_case
\begin{pmatrix}1\\2\end{pmatrix} ✗ \begin{Bmatrix}1\\2\end{Bmatrix} ‖ 1, 2 ✓ 1,\quad 2
\begin{pmatrix}1\\2\end{pmatrix} ✗ \begin{bmatrix}1&2\end{bmatrix} ‖ 1-\pi ✓ 1 - \pi ‖ 5' ✗ 5
\begin{pmatrix}10\end{pmatrix} ✗ \begin{bmatrix}1&0\end{bmatrix} ‖ 5'000 ✗ 5000
(3, 100) ✗ (3{,}100) | (3\,100) ‖ x=1, 234 ✗ x=1{,}234 ‖ p ✗ ~p ‖ 5-3 ✗ 5 -3 ‖ 5 3 ✗ 5 % 3
x^12 ✗ x^\text{12} ‖ A ✗ A^\circ ‖ 30 C ✗ 30^\circ C ‖ 1000 ✓ 1,\!000 ‖ 3-\sqrt{2} ✓ 3 - \sqrt{2}
2-(x+1) ✓ 2 - (x+1) ‖ 2^{n+1}-1 ✓ 2^{n+1} - 1 ‖ (\frac{3}{4},100) ✓ \left(\dfrac34, 100\right)
""")


def verdicts():
    """Each text of BOXES with its gold and whether it is right."""
    for row in BOXES:
        gold, *marked = re.split(" ?([✓✗]) ", " | ".join(row))
        for mark, many in zip(marked[::2], marked[1::2]):
            yield from ((text, gold, mark == "✓") for text in many.split(" | "))


@cases("text, gold, right", list(verdicts()))
def test_the_reward_is_the_contract(text, gold, right):
    """A text is what stands in the box, or a whole completion with a box."""
    text = text if "\\boxed" in text else f"So \\boxed{{{text}}}."
    assert boxed_reward(text, gold) == right


BODY = "We add 3.5 and 4.\n\nSo it is \\boxed{7.5}."  # {} in the tables
PIECES = (
    "\\boxed{ { } \\ $ , . - + % / ^ = 1 23 000 \\frac{1} \\text{ nan ٣ ½ x \x00 \ud800 "
    "<think> </think> <|im_end|> <|a Sure! reference"
).split() + [" ", "\n", ": ", "the reference ", "here is my "]


def test_any_text_has_a_reward_and_can_be_cleaned():
    draw = random.Random(0)
    for _ in range(5_000):
        text = "".join(draw.choices(PIECES, k=draw.randint(0, 20)))
        assert boxed_reward(f"\\boxed{{{text}}}", text[:3]) in (0.0, 1.0)
        assert len(repo.clean_rephrase(text)) <= len(text)
    assert boxed_reward(f"\\boxed{{{'9' * 5000}}}", "9") == 0


@pytest.mark.slow
@cases("piece", PIECES)
def test_a_million_characters_of_any_piece_take_linear_time(piece):
    """Eight times the text may take thirty times as long, and not sixty-four."""

    def seconds(length):
        text = form.replace("@", (piece * length)[:length])
        return min(timeit.repeat(lambda: function(text, "1"), repeat=3, number=1, timer=clock))

    clock, box = time.process_time, "\\boxed{a@b}"
    for function, form in ((boxed_reward, "@"), (boxed_reward, box), (repo.clean_rephrase, "@")):
        assert seconds(1_000_000) < 30 * max(seconds(125_000), 0.01)


@table(r"""
text
There is a unique solution, x = 3. The solution set is {3}.
1. Add 3.⏎2. Add 4.⏎3. So \boxed{7}.
## Solution⏎⏎- Add 3.⏎- Add 4.⏎⏎**Answer:** \boxed{7}
|n|f|⏎|---|---|⏎|1|3|⏎⏎\boxed{3} ‖ So we get⏎\[⏎\boxed{72}⏎\] ‖ ```python⏎def f(x):⏎    return x⏎```
The given equation has a solution. Surely 3 < x and y|z > 1: a <s b> c.
We rewrite the equation as 3x. It can be rewritten as 3y. In other words, find n. Hinton said 3.
I hope to reach 60 km/h. If you have 3 questions and guess, 1/8. If you need 3, you have 5.
The correct answer is (B). The given answer choices are 3 and 4.
The answer given by 2+3 is 5. So \boxed{5}. ‖ Note: x must be positive. Then x = 2.
The total is given. He provided 3 apples, as stated in the question.
""")
def test_cleaning_keeps_a_direct_answer_as_it_is(text):
    for answer in ("", BODY, text):
        assert repo.clean_rephrase(answer) == answer


@table(r"""
text
Sure!⏎{} ‖ Of course! Understood.⏎⏎{} ‖ **Certainly!**⏎{} ‖ In my own words:⏎{}
Sure, here is the rephrased solution:⏎⏎{} ‖ Here is my rewritten version of the answer:⏎{}
**Rephrased solution:**⏎⏎⏎{} ‖ As the reference solution shows, we add.⏎{} ‖ ---⏎Sure!⏎---⏎{}
According to the notes, we add.⏎Here is the solution.⏎⏎{} ‖ The expert's answer is right.⏎{}
{}⏎⏎I hope this helps! ‖ {}⏎Hope that answers it.⏎⏎Let me know if you have any questions.
{}⏎From your explanation, as you noted, it is so. ‖ {}⏎⏎(I hope this helps!)⏎⏎**Thank you!**
{}⏎⏎Note: I rephrased the solution in my own words.
{}⏎This matches the reference solution. Is there anything else I can do?
""")
def test_cleaning_cuts_what_is_no_answer_from_the_ends(text):
    assert repo.clean_rephrase(text.replace("{}", BODY)) == BODY


@table(r"""
text | question
The notes C, E and G: 3 notes. So \boxed{3}. | A chord has the notes C, E and G. How many?
The reference solution has 3 mol. In the solution 2 mol react. | A reference solution of 3 mol.
Two notes of 5 in the till make 10. | A cashier has two notes of 5.
The reference angle is 30 degrees. | Find the reference angle.
The expert's hint was 7. So \boxed{7}. | The expert gave a hint, 7. What was it?
""")
def test_a_word_of_the_question_is_no_talk_of_the_source(text, question):
    assert repo.clean_rephrase(text, question) == text
    assert repo.clean_rephrase(text) == ""


FORMS = "{} We add 3.5. So 7.|We add. {} So 7.|We add 3.5. {}|We add 3.⏎{}⏎So 7.|{}⏎So 7."


@table(r"""
leak
According to the hint, it is 7. ‖ According to the notes, she sold 24. ‖ The notes add 4.
The notes say that we add 4. ‖ Using the notes, we add 4. ‖ As per your notes, we add 4.
As the expert shows, 4 follows. ‖ The expert's answer is 7. ‖ The reference gives 4.
This matches the reference: 7. ‖ As stated in the reference, we add 4.
Based on the solution, 4 follows. ‖ Based on the given solution, we add 4.
According to the provided solution, 4 follows. ‖ The given solution says 7.
Like the solution above, we add 4. ‖ The solution you gave adds 4. ‖ The solution above gives 4.
The solution provided shows 4. ‖ As in the sample solution, 4 is added. ‖ The solution indicates 4.
Following the explanation, we add 4. ‖ The explanation says that 4 is added.
In your solution 4 is added. ‖ You provided 4 as the next term. ‖ As you've explained, we add 4.
As you mentioned, we add 4. ‖ I reworded the second step: add 4. ‖ The rewritten solution adds 4.
Now I rephrase the next step, 4. ‖ To paraphrase step 2, we add 4. ‖ In my own words, 4 is added.
As requested, here comes step 4. ‖ You just explained that 4 is added. ‖ The _notes_ say 4.
According to the provided step-by-step solution, 4. ‖ I re-phrased it: 4.
Based on the information provided in the steps above, 4. ‖ The given answer is 4.
""")
@cases("text", FORMS.replace("⏎", "\n").split("|"))
def test_no_leak_passes_wherever_it_stands(leak, text):
    clean = repo.clean_rephrase(text.replace("{}", leak))
    assert clean in ("", text.replace("{}", "").strip())


@table(r"""
text
<think>⏎The reference says 7.⏎</think>⏎{} ‖ so 7</think>{} ‖ <think>on and on
{}<|im_end|>⏎<|im_start|>user⏎And 2+2? ‖ {}</s> ‖ <start_of_turn>model⏎{}<end_of_turn>
{}<｜end▁of▁sentence｜> ‖ Sure, here it is: {} ‖ Sure, x = 7. {} ‖ {} I hope this helps with step 2.
Sure! {} ‖ According to the notes, we add. {} ‖ {} This matches the reference solution.
According to the notes,⏎we add 3.⏎{} ‖ The notes say that the total is⏎12.⏎{} ‖ Of course x ≥ y.⏎{}
{}⏎So it is 7.5, which matches⏎the reference. ‖ |notes|n|⏎|---|---|⏎|C|3|⏎{}
The notes say that the choice is B.⏎{} ‖ The notes give a > b.⏎{} ‖ {}⏎It is 36 (⏎see the notes).
""")
def test_thoughts_control_tokens_and_what_a_cut_would_tear_are_refused(text):
    assert repo.clean_rephrase(text.replace("{}", BODY)) == ""


# ------------------------------------------------------------------------------------------- data


def answers(path, values, **columns):
    """What is read of a file with these answers."""
    written(path, [dict(q="q", k="k", a=value) for value in values])
    return [problem["answer"] for problem in read(path, **columns)]


@cases("path", "d.json d.jsonl d.parquet d[1].jsonl *.json".split())
@table("""
values
["007", "NA", "None", "nan", "1e-05", "1.50", "2024-01-05", "True", "12345678901234567"]
["9007199254740993", "42"] ‖ ["0.00001", "0.50"] ‖ [9007199254740993, 0, -1]
""")
def test_an_answer_is_what_the_file_says(path, values):
    answers("d1.jsonl", ["another"])  # which d[1].jsonl and *.json would find as patterns
    assert answers(path, json.loads(values)) == [*map(str, json.loads(values))]


@table(r"""
path | values | expected
d.json | [9007199254740993, null, 0] | 9007199254740993 0
d.parquet | [9007199254740993, null, 0] | 9007199254740993 0
d.jsonl | ["4", "\\boxed{5}", "#### 6"] | 4 5 6
d.jsonl | ["2024-01-05", "2024-01-06"] | timestamp.*write text
d.jsonl | [0.5, 1] | float64 ‖ d.parquet | [42.0, null] | float64 ‖ d.json | [true, false] | bool
d.parquet | [["4"], ["5"]] | List
d.jsonl | ["007", 3, "[1, 2]"] | Json.*keys and types
d.jsonl | [3, "007"] | Json.*keys and types
d.jsonl | [{"n": 1}, {"m": 1}] | no column|Json
d.jsonl | [[{"role": "user", "content": [{"text": "4"}]}]] | List
d.jsonl | [[{"from": "human", "value": "4"}]] | from
d.jsonl | [{"ground_truth": "4"}] | a.ground_truth
d.jsonl | [""] | 0 of 1 records
""")
def test_gaps_are_left_out_and_what_has_no_one_spelling_is_refused(path, values, expected):
    try:
        assert answers(path, json.loads(values)) == expected.split()
    except RepoError as error:
        assert re.search(expected, str(error)), error


def test_a_class_label_is_refused_and_not_read_as_its_index():
    Dataset.from_dict(dict(a=[1]), Features(a=ClassLabel(names="01"))).to_parquet("d.parquet")
    with refused("ClassLabel"):
        read("d.parquet", q="a", k="a")


def test_a_column_that_the_library_has_made_opaque_says_why():
    """As in verl's files: the records' dicts differ in their keys."""
    with refused("'a.n'.*Json.*the same keys.*parquet"):
        answers("d.jsonl", [dict(n="4"), dict(m="4")], a="a.n")


@cases("path", ["d.parquet", "d.jsonl"])
def test_chats_and_fields_of_dicts_are_read_as_in_luffy_and_verl(path, capsys):
    system, user = dict(role="system", content="s"), dict(role="user", content="2+2? ")
    expert = dict(role="assistant", content="<think>\nwell\n</think>\nso \\boxed{4}")
    chats = [user], [system, user], [user, expert], [system], None
    written(path, [dict(q=chat, k=[expert], m=dict(truth="4", n=1)) for chat in chats])
    expected = dict(question="2+2?", knowledge="so \\boxed{4}", answer="4")
    assert read(path, a="m.truth") == read(path, a="k") == [expected] * 2
    assert "2 of 5 records" in capsys.readouterr().out


def test_an_experts_thoughts_are_cut_and_endless_ones_leave_the_record_out():
    thoughts = ["<think>a</think>so", "a</think> <think>b</think> so", "<think>on and on"]
    written("d.jsonl", [dict(q="q", k=text, a="4") for text in thoughts])
    assert [problem["knowledge"] for problem in read("d.jsonl")] == ["so", "so"]


def test_a_file_that_was_edited_with_size_and_time_kept_is_read_anew():
    assert answers("d.jsonl", ["4"]) == ["4"]
    stamp = os.stat("d.jsonl")
    Path("d.jsonl").write_text(Path("d.jsonl").read_text().replace("4", "5"))
    os.utime("d.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert [problem["answer"] for problem in read("d.jsonl")] == ["5"]


def test_plain_grpo_needs_no_solutions():
    written("d.jsonl", [dict(question="q", answer="4")])
    run = repo.Run("m", "d.jsonl", "o")
    assert repo.load_problems(run, "train", guided=False)[0]["answer"] == "4"
    run = replace(run, knowledge_column="none")
    assert repo.load_problems(run, "train", guided=False)[0]["knowledge"] == ""
    with refused("no column 'none'"):
        repo.load_problems(run, "train")


@table(r"""
text | knowledge | answer
#### Step 1⏎so⏎#### 42 | #### Step 1⏎so⏎The final answer is \boxed{42}. | 42
so⏎##### a⏎####B | so⏎##### a⏎The final answer is \boxed{B}. | B
so⏎#### 1,200 m⏎ | so⏎The final answer is \boxed{1,200 m}. | 1,200 m
\boxed{7}.⏎#### Check⏎2 + 5 = 7 | \boxed{7}.⏎#### Check⏎2 + 5 = 7 | 7
\boxed{7}.⏎#### Check | \boxed{7}.⏎#### Check | 7
so⏎#### $\boxed{7}$ | so⏎#### $\boxed{7}$ | 7
2 = <<6/3=2>>2, <<2*1000=2000>>2,000⏎#### 2 | 2 = 2, 2,000⏎The final answer is \boxed{2}. | 2
<<2-1.5=.5>>.5 (<<(1+1)*50%=1>>1)⏎#### 1 | .5 (1)⏎The final answer is \boxed{1}. | 1
1 <<= x, 1<<2=4>>x⏎#### 4 | 1 <<= x, 1<<2=4>>x⏎The final answer is \boxed{4}. | 4
cout << x=1 >> y⏎#### 4 | cout << x=1 >> y⏎The final answer is \boxed{4}. | 4
1 <<= x 1<<2=4>>3 \boxed{4} | 1 <<= x 1<<2=4>>3 \boxed{4} | 4
""")
def test_only_a_text_that_ends_in_its_mark_is_in_the_notation_of_gsm8k(text, knowledge, answer):
    written("d.jsonl", [dict(q="#### q", k=text)])
    assert read("d.jsonl", a="k") == [dict(question="#### q", knowledge=knowledge, answer=answer)]
    assert boxed_reward(knowledge, answer) == 1


def test_records_without_an_answer_are_left_out_and_counted(capsys):
    marks = "no mark|so\n#### 4|####  |#### Step\nso|so\n##### x||so \\boxed{7}"
    assert answers("d.jsonl", marks.split("|"), k="a") == ["4", "7"]
    assert "2 of 7 records" in capsys.readouterr().out
    assert len(read("d.jsonl", "train[3:]", k="a")) == 1


@table("""
name | split | content
d.jsonl | train | ⏎ ‖ d.jsonl | train | {"q":⏎ ‖ d.jsonl | test | {} ‖ none.json | train | {}
d.jsonl | train[:0] | {"q": 1, "k": 1, "a": 1}
d.jsonl | train | {"q": "é", "k": "k", "a": "a"}
""")
def test_what_cannot_be_read_ends_in_one_line(name, split, content):
    Path(name.replace("none", "d")).write_text(content, "latin-1")
    with refused(rf"\A.*{name}' has no .*\Z"):
        read(name, split)


def test_a_csv_file_is_refused_with_the_line_that_converts_it():
    Path("x.csv").write_text("q,k,a\nq,so,007\nq,so,\nq,so\n")
    with refused("x.csv' must be") as error:
        read("x.csv")
    [command] = re.findall('python -c "(.*)"', str(error.value))
    exec(command)
    assert [problem["answer"] for problem in read("x.parquet")] == ["007"]


def test_overlong_problems_are_left_out_and_counted(capsys):
    tokenizer = byte_tokenizer(None, eos="<|eos|>")
    problems = [dict(question="q" * n, knowledge="k" * (98 - n)) for n in (49, 1, 50)]
    cfg = replace(CFG, question_prompt="{question}", rephrase_prompt="{knowledge}")
    context = len(encode_prompt(tokenizer, "")) + 49 + CFG.max_new_tokens
    rest = tiny_model(max_position_embeddings=context), tokenizer, cfg
    assert repo.fitting(problems, *rest) == problems[:1]
    assert "1 of 3 problems" in capsys.readouterr().out
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    lengths = dict(max_position_embeddings=4 * context, original_max_position_embeddings=context)
    long = tiny_model("phi3", pad_token_id=0, rope_parameters=rope, **lengths)
    assert repo.fitting(problems, long, *rest[1:]) == problems[:1]


def test_problems_that_spell_out_a_control_token_are_left_out():
    """The library turns some of them into the token itself, whatever it is told."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|fim|>", "<think>", "plain"])
    spelled = ["a", "<|fim|>", "a <think>", "a <|im_end|>", "plain"]
    problems = [dict(question=text, knowledge="k") for text in spelled]
    problems += [dict(question="a", knowledge=text) for text in spelled]
    kept = repo.fitting(problems, tiny_model(vocab=310), tokenizer, CFG)
    assert kept == [problems[i] for i in (0, 4, 5, 9)]


# ----------------------------------------------------------- the command line, on files made here


def test_a_run_on_a_saved_checkpoint_and_gsm8k_shaped_data(files, capsys):
    repo.main(flags(files, eval_split="train[:3]", device=DEVICE, kl_beta=0.1), graded)
    assert [row["step"] for row in lines()] == [0, 1, 2, 3]
    assert lines()[3]["kl"] > 0  # the reference stays as it was
    assert [*lines(name="summary.json")[0]] == ["accuracy_before", "accuracy_after"]
    shown = capsys.readouterr()
    assert re.search(r"step 3: reward \S+, injections \d+, truncated \d+%", shown.out)
    assert "it/s" not in shown.err  # no bars where no terminal is
    assert re.search(r"the reward takes \d+ of \d+ experts' texts", shown.out)
    question = lines(files, "data.jsonl")[0]["question"]
    assert f"training on {DEVICE}; the first prompt:\n{question}=" in shown.out
    model, tokenizer = repo.load_model("out/model", "cpu")
    assert model.dtype == torch.float32 and tokenizer.chat_template


def test_an_episode_is_all_that_was_said_to_the_first_hard_question(scripted):
    scripted(rollout="\\boxed{2}", rephrase="Sure!\nSo it is \\boxed{4}.<|im_end|>")
    problems = [PROBLEMS[0], dict(PROBLEMS[0], answer="4")]  # one question, the first time solved
    _, groups, guides = step(problems=problems)
    said = dict(rollouts=[dict(reward=0.0, text="\\boxed{2}")] * 4, guide="So it is \\boxed{4}.")
    said |= dict(draft="Sure!\nSo it is \\boxed{4}.", reward=1.0, injected=True)
    assert repo.episode(groups, guides) == problems[1] | said


def test_a_resumed_run_equals_an_unbroken_one_and_another_seed_gives_another(files, monkeypatch):
    def given(out, **changes):  # the gate always opens: each step moves the weights
        return flags(files, out, gate_threshold=0, **changes)

    Path("whole").mkdir()
    Path("whole/metrics.jsonl").touch()  # a log without a line is no run
    repo.main(given("whole", steps=5, save_every=0), graded)
    assert "holds a run" in refusal(given("whole"))
    assert "holds no run" in refusal(given("wohle", resume=True))
    assert "begun with seed = 0, now it is 1" in refusal(given("whole", resume=True, seed=1))
    repo.main(given("parts", steps=3, save_every=2), graded)
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert lines("parts", name)
        with Path("parts", name).open("a") as log:
            log.write('{"step": 3, "half a li')  # what a killed run may leave
    repo.main(given("parts", steps=5, resume=True, micro_batch_tokens=9999), graded)
    assert outcome("whole") == outcome("parts") and lines("whole")[1]["grad_norm"] > 0
    repo.main(given("other", steps=1, seed=1), graded)
    assert lines("other") != lines("whole")[:1]
    assert repo.draw_batch(PROBLEMS, 0, CFG) != repo.draw_batch(PROBLEMS, 1, CFG)
    with pytest.raises(SystemExit, match="data or reward"):
        repo.main(given("whole", resume=True, steps=5))
    monkeypatch.setattr(repo, "load_problems", lambda *_: PROBLEMS)
    assert "data or reward" in refusal(given("whole", resume=True))


def test_a_checkpoint_is_replaced_as_a_whole(files, monkeypatch):
    repo.main(flags(files, steps=1))
    before = Path("out/checkpoint.pt").read_bytes()

    def fail(state, path):
        path.write_text("half")
        raise ZeroDivisionError

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(ZeroDivisionError):
        repo.main(flags(files, resume=True, steps=2))
    assert Path("out/checkpoint.pt").read_bytes() == before


def test_a_second_process_does_not_get_in(files):
    Path("out").mkdir()
    with repo.FileLock("out/.lock"):
        assert "another process trains into out; choose" in refusal(flags(files))
    repo.main(flags(files, steps=1))


def test_too_little_memory_ends_in_a_line_that_names_the_flags(files, monkeypatch):
    failure = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(repo, "train_step", Mock(side_effect=failure))
    assert re.search("of memory.*--group-size.*--micro-batch-tokens", refusal(flags(files)))


@pytest.mark.slow
def test_killed_at_twenty_moments_a_run_still_ends_as_an_unbroken_one(files):
    """Each process is ended by SIGKILL; after twenty kills the run is left to finish."""
    metrics, reached = Path("out/metrics.jsonl"), []

    def start(out):
        log = Path(out, "metrics.jsonl")
        begun = log.exists() and log.stat().st_size > 0
        argv = flags(files, out, steps=40, save_every=1, batch_size=1, group_size=2, resume=begun)
        return subprocess.Popen([sys.executable, repo.__file__, *argv])

    while len(reached) < 20:
        process, times, moment = start("out"), set(), random.randint(2, 8)
        # The file is touched when the run begins, when it is resumed and at each step.
        while process.poll() is None and len(times) < moment:
            if metrics.exists():
                times.add(metrics.stat().st_mtime_ns)
            time.sleep(random.random() / 10)
        process.kill()
        if process.wait():
            assert process.returncode == -signal.SIGKILL
            reached.append(metrics.read_text().count("\n"))
        else:  # it had come to its end: anew
            os.remove("out/checkpoint.pt")  # the log alone is a run too, of which nothing is kept
    assert len(set(reached)) > 5
    assert start("out").wait() == start("whole").wait() == 0
    assert outcome("whole") == outcome("out")


@table("""
change | message
--question-column=problem | problem.*'question', 'answer' ‖ --eval-split=test | no readable
--knowledge-column=question --answer-column=question | 0 of \\d+ records
--guidance=verbatim --knowledge-column=question | takes no expert's text ‖ --steps=0 | --steps is 0
--dataset=checkpoint.pt | must be a .json ‖ --dataset=. | must be a .json
--out=checkpoint.pt | --out ‖ --out=checkpoint.pt/below | --out ‖ --device=cuda:77 | --device
--out=. --resume | checkpoint.pt cannot be read: .*; choose another --out
--device=abacus | --device ‖ --group-size=1 | group_size cannot be 1
""")
def test_what_cannot_work_ends_before_the_model_is_loaded(files, change, message, monkeypatch):
    monkeypatch.setattr(repo, "load_model", None)
    Path("checkpoint.pt").touch()  # damaged
    assert re.search(f"^error: .*{message}", refusal(flags(files) + change.split()))


def test_an_experts_text_that_the_reward_does_not_take_is_shown(files, capsys):
    refusal(flags(files) + ["--guidance=verbatim", "--knowledge-column=question"])
    assert "it does not take, for '" in capsys.readouterr().out


def test_a_model_that_cannot_work_ends_in_one_line(files):
    assert "lower --max-new-tokens" in refusal(flags(files, max_new_tokens=2048))
    assert "200 embeddings" in refusal(flags(files, model=saved(tiny_model(vocab=200))))
    assert "lacks weights, ['lm_head" in refusal(flags(files, model=saved(tiny_model().model)))
    Path(saved(tiny_model()), "config.json").rename("saved/adapter_config.json")
    assert "saved' cannot be loaded" in refusal(flags(files, model="saved"))


@pytest.mark.filterwarnings("ignore")
def test_weights_that_take_no_gradient_are_refused(monkeypatch):
    model = tiny_model()
    saved(model)
    model.model.norm.weight.requires_grad_(False)
    loaded = model, dict(missing_keys=[])
    with monkeypatch.context() as patch, refused("take no gradient"):
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **options: loaded)
        repo.load_model("saved", DEVICE)
    config = json.loads(Path("saved/config.json").read_text())
    written("saved/config.json", config | dict(quantization_config=dict(quant_method="fp8")))
    with refused("saved'"):
        repo.load_model("saved", DEVICE)


def test_of_a_multimodal_checkpoint_the_language_model_is_trained_and_that_is_said(capsys):
    vision = dict(hidden_size=32, out_hidden_size=32, num_heads=2, depth=1)
    config = Qwen3_5Config(text_config=SHAPE | dict(vocab_size=300), vision_config=vision)
    saved(AutoModelForImageTextToText.from_config(config))
    model, _ = repo.load_model("saved", DEVICE)
    assert not any("visual" in name for name, _ in model.named_parameters())
    assert "only the language model is trained and saved, qwen3_5_text" in capsys.readouterr().out


def test_what_a_library_says_is_passed_on_whole():
    with refused("a: gated See the page; b"), repo.explaining("a", "b"):
        raise OSError("gated\n\nSee the page")


def test_a_mistyped_flag_is_named(files, capsys):
    with pytest.raises(SystemExit):
        repo.main(flags(files, grup_size=8))
    assert "unrecognized arguments: --grup_size=8" in capsys.readouterr().err


def test_a_mixture_of_experts_is_trained_without_a_loss_of_its_own():
    mixture = tiny_model("mixtral", num_local_experts=4, output_router_logits=True)
    model, tokenizer = repo.load_model(saved(mixture), DEVICE)
    assert step(graded, model, tokenizer)[0]["grad_norm"] > 0


def test_weights_are_fp32_and_move_at_a_learning_rate_of_a_millionth():
    model, _ = repo.load_model(saved(tiny_model().to(torch.bfloat16)), DEVICE)
    before = all_weights(model)
    update(model, torch.optim.AdamW(model.parameters(), 1e-6), random_groups())
    assert before.dtype == torch.float32
    assert (all_weights(model) != before).float().mean() > 0.5


# -------------------------------------------------------------------------------------- run_tiny


def test_the_headline_of_the_miniature(world):
    """On a shortened run: RePO learns the book that GRPO never does, and the injections fade."""
    grpo = run_tiny.run(world, "grpo", 0, 10, DEVICE)
    rephrasing = run_tiny.run(world, "repo", 0, 80, DEVICE)
    assert grpo[0]["hard"] <= 0.02 and grpo[0]["general"] > 0.9
    assert grpo[-1]["hard"] <= 0.02 and sum(run_tiny.measured(grpo, "injections")) == 0
    assert rephrasing[-1]["hard"] > 0.5 and rephrasing[-1]["general"] > 0.8
    seen = {name: number(rephrasing) for name, number in run_tiny.COLUMNS.items()}
    assert seen["injections, last ten"] < 0.5 * seen["injections, first ten steps"]
    assert seen["logp/expert"] < -5 < -2 < seen["logp/rephrase"]
    model, tokenizer = repo.load_model(world.model, DEVICE)
    assert tokenizer.decode(repo.end_tokens(model, tokenizer)[0]) == "<eos>"


@cases("toy", [True, False])
def test_every_method_runs_in_both_worlds_and_without_hard_problems(toy, world):
    world = replace(world if toy else run_tiny.realms(3, saved(tiny_model())))
    world.cfg = replace(world.cfg, batch_size=6, max_new_tokens=20)
    world.held_out = {part: problems[:4] for part, problems in world.held_out.items()}
    easy = [problem for problem in world.problems if not problem["hard"]]
    results = []
    for folder, problems in (("all", world.problems), ("easy", easy)):
        part = replace(world, folder=Path(folder), problems=problems)
        results += [run_tiny.run(part, name, 0, 1, DEVICE) for name in run_tiny.METHODS]
    assert all(history[-1]["finished"] for history in results)
    shown = run_tiny.table(results, run_tiny.COLUMNS)
    assert all(f"| {name} |" in shown for name in run_tiny.METHODS)


def test_what_star_no_push_and_the_true_ratio_change(scripted):
    scripted("\\boxed{2}", "\\boxed{4}<|im_end|>")  # a solved question, an injection, a wrong one
    model, tokenizer = tiny_model(), byte_tokenizer()
    made = run_tiny.first_three_steps(model, tokenizer, PROBLEMS[:3], CFG, boxed_reward)
    rollouts, _, (solved, injected, failed), (guide, _) = made
    assert guide not in rollouts and guide in injected  # what was sampled is kept apart
    made = model, tokenizer, *made[1:], CFG
    solved[0].advantage = failed[0].advantage = -1.0
    run_tiny.no_push(*made)
    advantages = [o.advantage for o in solved[:2] + injected + failed[:2]]
    assert advantages == [-1, 0, guide.advantage, 0, 0, 0, -1, 0]
    repo.assign_advantages(made[3])
    run_tiny.star(*made)
    logp = sum(token_logps(model, [o], 1.0).mean() for o in [*solved, guide]) / 5
    assert_close(gradient_of(model, -logp), gradient(model, made[3], repo.update))
    run_tiny.true_ratio(*made)
    hinted = encode_prompt(tokenizer, repo.fill(CFG.rephrase_prompt, PROBLEMS[1]))
    assert_close(guide.old_logps, token_logps(model, [replace(guide, prompt=hinted)], 1.0))


def test_an_injection_that_adds_to_the_group_is_counted_and_one_without_text_refused(scripted):
    model, tokenizer = tiny_model(), byte_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    made = model, tokenizer, optimizer, PROBLEMS[1:3], CFG, boxed_reward, list.append  # G + 1
    scripted()
    metrics, groups, _ = run_tiny.step_with(*made)
    assert [len(group) for group in groups] == [5, 5]
    assert (metrics["injections"], metrics["reward"]) == (2, 0)
    scripted(rephrase="cut off")
    with pytest.raises(RepoError, match="without tokens"):
        run_tiny.step_with(*made)


def test_what_is_measured_is_never_trained_on():
    Path("codebooks 3/base").mkdir(parents=True)  # it draws a held-out problem once more
    codebooks, realms = run_tiny.codebooks(3, Path(), "cpu"), run_tiny.realms(0, "")
    _, *held_out = realms.held_out.values()  # not the trained questions
    held_out = sum([*codebooks.held_out.values(), *held_out], [])
    assert not any(problem in codebooks.problems + realms.problems for problem in held_out)


def test_worlds_are_drawn_from_their_seed():
    one, same, other = (run_tiny.realms(seed, "").problems for seed in (1, 1, 2))
    assert one == same != other
    assert run_tiny.realms(1, "a/b").folder.name.endswith("a b")


@table("""
text | reward
The capital of Katalia is Nudis. | 1 ‖ The capital of Katalia is Nudis | 1
The city of Nudis is that of Katalia is the city of Nudis. | 0
The capital of Katalia is Nudis, says the reference. | 0 ‖ Nudis Nudis. | 0 ‖ It is Nudis. | 0
""")
def test_the_reward_of_the_realms_takes_a_sentence_and_nothing_degenerate(text, reward):
    assert run_tiny.realm_reward(text, "Katalia, Nudis") == int(reward)
    for problem in run_tiny.realms(0, "").problems:
        assert run_tiny.realm_reward(problem["knowledge"], problem["answer"]) == 1


def test_a_comparison_is_shown_and_goes_on_where_it_stood(capsys):
    line = f"--model {saved(tiny_model())} --out out --steps 1 --world-seed 3 --device {DEVICE}"
    argv = f"{line} --methods repo verbatim".split()
    run_tiny.main(argv)
    assert "\n| verbatim | 0.00 | " in capsys.readouterr().out
    files = sorted(Path("out").rglob("metrics.jsonl"))
    before = [file.read_text() for file in files]
    assert '"method": "repo"' in before[0] and '"injections": ' in before[1]
    files[1].write_text(before[1].splitlines()[0] + '\n{"st')
    run_tiny.main(argv)
    assert capsys.readouterr().out.count("not trained again") == 1
    assert before == [file.read_text() for file in files]
    with pytest.raises(SystemExit):
        run_tiny.main(["--rate", "0"])
    run_tiny.main(["--show", "out"])
    shown = capsys.readouterr().out
    assert all(f"\n{key} " in shown for key in "hard injections reward logp/expert".split())


def test_one_step_is_explained(world, capsys):
    run_tiny.explain(world, DEVICE, charts=True)
    shown, problem = capsys.readouterr().out, world.held_out["hard"][0]
    assert problem["question"] in shown and problem["knowledge"] in shown
    assert "1.50, -0.50, -0.50, -0.50" in shown and "\nxychart-beta" in shown
