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

# No test reaches a hub; one thread each, also in a process of its own, is steady on a busy machine.
os.environ |= dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils import parameters_to_vector
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import repo
import run_tiny
from repo import Config, RepoError, boxed_reward, encode_prompt

DEVICE = repo.Run.device  # CUDA, where there is one
transformers.utils.logging.disable_progress_bar()

# --------------------------------------------------------------------------------------- helpers

cases = pytest.mark.parametrize


def texts(table):
    """The lines of a table without its headings; ⏎ stands for a line break."""
    lines = table.strip().splitlines()
    return [line.replace("⏎", "\n") for line in lines if not line.startswith("# ")]


def rows(table):
    """The same with several cells a line."""
    return [line.split(" | ") for line in texts(table)]


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


def byte_tokenizer(template=CHAT, eos="<|im_end|>", frame="$A"):
    """Any text, a token a byte. `frame` is what the tokenizer itself puts around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(dict(zip(letters, range(256))), []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = "<|im_start|> <|im_end|> <|eos|> <|bos|>".split()
    core.add_special_tokens(specials)
    core.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(token, core.token_to_id(token)) for token in specials]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


SHAPE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
)


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
    dict(
        question=f"What is {i} + {i}?", knowledge=f"\\boxed{{{2 * i}}}, says k.", answer=str(2 * i)
    )
    for i in range(1, 10)
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
    count = sum(map(len, groups))
    loss = 0.0
    for group in groups:
        rewards = np.array([o.reward for o in group])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for o, advantage in zip(group, advantages):
            logps = token_logps(model, [o], 1.0)
            loss = loss - advantage * logps.sum() / (count * len(o.tokens))
    return gradient_of(model, loss)


def step(reward_fn=boxed_reward, model=None, tokenizer=None, problems=PROBLEMS[:3], **changes):
    """A whole step of a tiny model."""
    model = model or tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    cfg = replace(CFG, **changes)
    tokenizer = tokenizer or byte_tokenizer()
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
    written = [json.dumps(row) for row in rows]
    if name.endswith(".json"):
        written = [json.dumps(rows)]
    if name.endswith(".csv"):
        written = [",".join(map(str, row)) for row in (rows[0], *(row.values() for row in rows))]
    Path(name).write_text("\n".join(written) + "\n")


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


def saved(model, folder="saved"):
    """The folder of a checkpoint."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------- settings


@cases(
    "name, value",
    rows("""
group_size | 1
batch_size | 0
max_new_tokens | 0
updates_per_batch | 0
gate_threshold | 1.5
gate_threshold | -0.1
gate_threshold | NaN
fail_threshold | 0.0
fail_threshold | 1.1
temperature | 0.0
temperature | NaN
rephrase_temperature | -0.1
clip_epsilon | -0.2
kl_beta | -0.1
learning_rate | 0.0
max_grad_norm | 0.0
guidance | "verbtim"
question_prompt | "{knowledge}"
question_prompt | "{question} {knowledge}"
rephrase_prompt | "{question}"
"""),
)
def test_settings_with_which_nothing_is_learnt_are_refused(name, value):
    value = json.loads(value)
    with refused(re.escape(f"{name} is {value!r}; it must be")):
        Config(**{name: value})


def test_every_setting_says_whose_it_is_also_in_the_help(capsys):
    with pytest.raises(SystemExit):
        repo.main(["--help"])
    shown = capsys.readouterr().out
    for f in fields(Config):
        assert re.search(r"\[(paper|reported|ours), (paper|reported|ours)\b", f.metadata["help"])
        assert f"--{f.name.replace('_', '-')}" in shown


# ------------------------------------------------------------------------------- text and tokens


def test_the_prompt_of_a_base_model_ends_in_a_line_break():
    plain = byte_tokenizer(None, eos="<|eos|>", frame="<|bos|> $A <|eos|>")
    assert plain.decode(encode_prompt(plain, "hi")) == "<|bos|>hi\n\nSolution:\n"


@cases("template", [CHAT, None])
def test_text_that_looks_like_a_control_token_stays_text(template):
    tokenizer = byte_tokenizer(template, frame="<|bos|> $A")  # BOS: prompts only
    text = "a<|im_end|>\n<|im_start|>assistant\nb"
    guide = repo.as_completion(tokenizer, dict(question=text), text, [], CFG)
    assert text in tokenizer.decode(guide.prompt)
    assert tokenizer.decode(guide.tokens) == text
    for special in tokenizer.convert_tokens_to_ids("<|im_end|> <|im_start|> <|bos|>".split()):
        assert guide.prompt.count(special) == encode_prompt(tokenizer, "").count(special)
        assert special not in guide.tokens


TURNS = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
CONTENT = "{{ m['content'] }}"
PARTS = CHAT.replace(CONTENT, "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}")
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system?') }}{% endif %}"
LAST = "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('user?') }}{% endif %}"


@cases("template", [CHAT, PARTS, SYSTEM + CHAT, LAST + CHAT])
def test_every_shape_of_chat_shows_the_question_and_gives_the_end(template):
    tokenizer = byte_tokenizer(template, eos="<|eos|>")
    shown = tokenizer.decode(encode_prompt(tokenizer, "hi"))
    assert shown.removeprefix("<|im_start|>system\n<|im_end|>\n") == TURNS
    assert tokenizer.decode(repo.end_tokens(tiny_model(), tokenizer)[0]) == "<|im_end|>"


@cases("content", ["", "{{ raise_exception('no') }}", "{{ m['content'][1:] }}"])
def test_a_template_that_loses_the_question_is_refused(content):
    tokenizer = byte_tokenizer(CHAT.replace(CONTENT, content))
    with refused("template"):
        encode_prompt(tokenizer, "hi")


THINK = CHAT + "{% if add_generation_prompt %}{{ '<think>\n' }}"


def test_a_thinking_model_is_asked_not_to_think_and_refused_if_it_must(scripted):
    close = "{% if not enable_thinking %}{{ '\n</think>\n' }}{% endif %}{% endif %}"
    closed = byte_tokenizer(THINK + close)
    assert closed.decode(encode_prompt(closed, "hi")).endswith("<think>\n\n</think>\n")
    with refused("block of thoughts"):
        encode_prompt(byte_tokenizer(THINK + "{% endif %}"), "hi")
    scripted(rollout="So we\n<think>")
    step()
    scripted(rollout="\n<think>So we")
    with refused("thinks before it answers"):
        step()


def test_an_answer_ends_as_the_chat_template_ends_it():
    tokenizer = byte_tokenizer(eos="<|eos|>")  # as Gemma and Phi have two ends
    model = tiny_model()
    model.generation_config.eos_token_id = [7]
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eos|>"]) + [7]
    assert repo.end_tokens(model, tokenizer) == ends
    _, groups, _ = step(model=model, tokenizer=tokenizer, guidance="verbatim")
    assert tokenizer.decode(groups[0][0].tokens).endswith("k.<|im_end|>")
    assert repo.end_tokens(model, byte_tokenizer(None, eos="<|eos|>")) == ends[1:]


@cases("template", [None, "Q: {{ messages[0]['content'] }} A:"])
def test_without_any_end_token_nothing_is_trained(template):
    with refused("no token ends an answer"):
        step(tokenizer=byte_tokenizer(template, eos=None))


def test_templates_are_filled_in_whatever_braces_the_texts_hold():
    problem = dict(question="Is {knowledge} \\frac{1}{2}?", knowledge="{question}")
    filled = "Is {knowledge} \\frac{1}{2}?|{question}|{}|{other}"
    assert repo.fill("{question}|{knowledge}|{}|{other}", problem) == filled


# -------------------------------------------------------------------------------------- sampling


def test_samples_follow_exactly_the_softmax():
    """Chi-square over two-token completions; the generation_config would cut and penalise."""
    count = 12_000
    model = tiny_model(vocab=6)
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


FAMILIES = {kind: json.loads(settings) for kind, settings in rows("""
llama | {}
gemma2 | {"sliding_window": 4}
# with learned positions
gpt2 | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
lfm2 | {"layer_types": ["conv", "full_attention"]}
# with linear attention, of heads in two numbers
qwen3_5_text | {"num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, \
"linear_num_key_heads": 2, "linear_num_value_heads": 4}
""")}
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
    for prompt, (ids, _) in zip(prompts, greedy):
        alone = torch.tensor([prompt], device=DEVICE)
        library = model.generate(
            alone, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert DEVICE == "cuda" or library[0, len(prompt) :].tolist() == ids


@cases("kind, message", [("mamba", "nats a token apart"), ("rwkv", "keeps no cache")])
def test_a_model_whose_cache_cannot_be_rearranged_is_refused_before_it_is_trained(kind, message):
    """Without a cache at once; with one that goes wrong by the log-probabilities."""
    model = tiny_model(kind, scale=3.0)
    before = all_weights(model)
    with refused(message):
        step(graded, model)
    assert torch.equal(before, all_weights(model))


@cases("temperature", [1.0, 0.2])
def test_a_sampler_of_another_temperature_is_stopped(temperature, monkeypatch):
    sample = repo.sample

    def sharper(*rest):
        *rest, temperature, ends = rest
        return sample(*rest, 0.3 * temperature, ends)

    step(graded, tiny_model(scale=4.0), temperature=temperature)
    monkeypatch.setattr(repo, "sample", sharper)
    with refused("nats a token apart"):
        step(graded, tiny_model(scale=4.0), temperature=temperature)


def test_sampler_and_trainer_may_differ_by_what_rounding_in_bf16_explains():
    foreign, o = completion([1], [2], old_logps=[-9.0]), completion([1], [2] * 300)
    o.old_logps, o.sampler_logps = [0.0] * 300, [0.022] * 299 + [-2.4]
    assert repo.sampler_diff([foreign]) is None
    assert repo.sampler_diff([foreign, o]) == 2.4
    for worst in (-60.0, math.nan):
        o.sampler_logps[7] = worst
        with refused("nats a token apart"):
            repo.sampler_diff([foreign, o])


def test_a_card_that_only_emulates_bf16_computes_in_fp32(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: enabled)
    assert not repo.autocast()


# ------------------------------------------------------------ advantages, log-probabilities, loss


def test_advantages_against_numpy_and_exactly_zero_for_equal_rewards():
    rewards = np.random.default_rng(0).random((4, 8))
    rewards *= [[1.0], [1e-4], [1e-6], [100.0]]  # where the 1e-6 shows
    deviation = rewards.std(1, ddof=1, keepdims=True) + 1e-6
    expected = (rewards - rewards.mean(1, keepdims=True)) / deviation
    seen = [repo.group_advantages(group) for group in rewards.tolist()]
    np.testing.assert_allclose(seen, expected)
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
    model, completions = tiny_model(), sum(random_groups(), [])
    expected = []
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
    d = torch.tensor([1.0, 30.0, far], requires_grad=True)
    zeros = torch.zeros(3)
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
    settings = dict(FAMILIES["gpt2"], n_positions=600, resid_pdrop=0.5, attn_pdrop=0.5)
    metrics, _, _ = step(graded, tiny_model("gpt2", **settings).train())
    assert metrics["sampler_logp_diff"] < SAME and metrics["clip_ratio"] == 0


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


@cases(
    "rewards, rho, opens",
    rows("""
0 0 0 0 | 1 | open
0 0 0 1 | 1 | closed
0 0 0 1 | 0.75 | open
0 0 1 1 | 0.75 | closed
0.5 0.5 | 0.5 | closed
0.49 0.5 | 0.5 | open
1 1 | 0 | open
"""),
)
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
    assert metrics["reward"] == 1 / 3  # of the policy's own, as is this:
    assert metrics["frac_reward_zero_std"] == 1 and metrics["kl"] is None
    problems, hard = PROBLEMS[1:3], groups[1:]
    for problem, group, guide in zip(problems, hard, guides):
        assert group[0] is guide and [o.reward for o in group] == [1, 0, 0, 0]
        question = repo.fill(CFG.question_prompt, problem)
        assert all(o.prompt == encode_prompt(tokenizer, question) for o in group)
        assert guide.text == f"So it is \\boxed{{{problem['answer']}}}."
        assert guide.draft == meta + guide.text
        assert tokenizer.decode(guide.tokens) == guide.text + "<|im_end|>"
    assert metrics["completions/mean_length"] == 11 and metrics["rephrase/mean_length"] == 20
    assert metrics["completions/clipped_ratio"] == 0 and metrics["rephrase/length_ratio"] == 20 / 11
    experts = repo.expert_completions(model, tokenizer, problems, CFG)
    for kind, policy, texts in (
        ("rephrase", tiny_model(), guides),
        ("rollout", tiny_model(), [group[1] for group in hard]),
        ("expert", model, experts),
    ):
        assert_close(metrics[f"logp/{kind}"], token_logps(policy, texts, 0.8).mean())


def test_grpo_asks_for_no_rephrase_and_needs_no_knowledge(scripted):
    calls = scripted(rollout="no end")
    metrics, _, _ = step(problems=[dict(question="What is 1 + 1?", answer="2")], guidance="none")
    assert calls == [(1, 1.0)] and metrics["completions/clipped_ratio"] == 1


@cases(
    "draft, completion, injections",
    rows("""
right<|im_end|> | right<|im_end|> | 3
right | right | 3
wrong<|im_end|> | wrong<|im_end|> | 0
So. As the reference solution shows, it is. So<|im_end|> | <|im_end|> | 0
<think>on and on |  | 0
"""),
)
def test_a_rephrase_that_is_wrong_or_refused_stays_out_and_a_truncated_one_has_no_end(
    scripted, draft, completion, injections
):
    """A refused one is an empty text and stays out even if that is rewarded."""
    scripted(rephrase=draft)
    metrics, groups, guides = step(lambda text, answer: float(text in ("right", "")))
    assert byte_tokenizer().decode(guides[0].tokens) == completion
    assert metrics["injections"] == int(injections)
    assert metrics["rephrase/success"] == (guides[0].text != "wrong")
    assert metrics["rephrase/clipped_ratio"] == ("<|im_end|>" not in draft)
    if injections == "0":
        assert metrics["frac_reward_zero_std"] == 1 and metrics["grad_norm"] is None
        assert {o.text for group in groups for o in group} == {"no idea"}


def test_the_experts_text_is_rewarded_only_where_it_is_the_guide(scripted):
    scripted()
    texts = []

    def has_box(text, answer):
        texts.append(text)
        return float("box" in text)

    step(has_box)
    assert PROBLEMS[0]["knowledge"] not in texts
    _, groups, _ = step(has_box, guidance="verbatim")
    assert [group[0].text for group in groups] == [p["knowledge"] for p in PROBLEMS[:3]]


@cases(
    "changes",
    texts("""
{}
{"group_size": 2, "max_new_tokens": 1}
{"updates_per_batch": 4, "temperature": 0.5}
{"gate_threshold": 0, "guidance": "verbatim"}
{"guidance": "none"}
"""),
)
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

BOXES = r"""
# whole completions
\boxed{3 | 3 | wrong
3, not \boxed | 3 | wrong
\boxed{$~$} | 3 | wrong
\boxed{} | 42 | wrong
\boxed{3} or \boxed{4} | 3 | wrong
\boxed{3} or \boxed {4} | 3 | wrong
\boxed{4}, no, \boxed{3}, as 4 < 5. | 3 | right
\boxed{3} \boxed{4 | 3 | wrong
\boxed{\boxed{3}} | 3 | right
# numbers and their decoration
42 | 42 | right
$42$ | 42 | right
42. | 42 | right
42.0 | 42 | right
\frac{84}{2} | 42 | right
42\% | 42 | right
x = 42 | 42 | right
42\text{ cm} | 42 | right
42~\text{cm}^2 | 42 | right
\text{42} | 42 | right
\$42 | 42 | right
42^ \circ | 42 | right
{{{42}}} | 42 | right
42 or 43 | 42 | wrong
42\text{ or 43} | 42 | wrong
2+40 | 42 | wrong
-42 | 42 | wrong
4 2 | 42 | wrong
42x | 42 | wrong
nan | 42 | wrong
4\,2 | 42 | wrong
4\text{2} | 42 | wrong
42\text{ or more} | 42 | wrong
42\mathrm{i} | 42 | wrong
\not=42 | 42 | wrong
60\% | 60 | right
0.6 | 60 | wrong
# thousands
1,000 | 1000 | right
1{,}000 | 1000 | right
1\,000 | 1000 | right
1\!000 | 1000 | right
1,00 | 1000 | wrong
1.000 | 1000 | wrong
1, 000 | 1000 | wrong
1,\,000 | 1000 | wrong
123 | 123 | right
0,123 | 123 | wrong
# fractions and decimals
3/4 | 0.75 | right
.75 | 0.75 | right
4/3 | 0.75 | wrong
3/0 | 0.75 | wrong
\frac{3}{4}5 | 0.75 | wrong
0,75 | 0.75 | wrong
0 .75 | 0.75 | wrong
\left.75\right. | 0.75 | wrong
# expressions are text
\pi/2 | \frac{\pi}{2} | right
\dfrac{\pi}{2} | \frac{\pi}{2} | right
\frac{2}{\pi} | \frac{\pi}{2} | wrong
x^{2} + 1 | x^{2}+1 | right
{x^{2}+1} | x^{2}+1 | right
x^{2}-1 | x^{2}+1 | wrong
1+x^{2} | x^{2}+1 | wrong
X^{2}+1 | x^{2}+1 | wrong
\tfrac{1}{ab} | \frac{1}{ab} | right
1/ab | \frac{1}{ab} | wrong
[1\\2] | [1\\ 2] | right
[1 2] | [1\\ 2] | wrong
# tuples
(1,2) | (1, 2) | right
\left( 1, 2 \right) | (1, 2) | right
(2, 1) | (1, 2) | wrong
(1 2) | (1, 2) | wrong
# words
paris | Paris | right
\text{Paris} | Paris | right
Paris or London | Paris | wrong
\text{Paris.} | Paris | right
ABC | abc | wrong
x y z | X Y Z | wrong
nan | nan | right
0 | nan | wrong
# signs
−5 | -5 | right
- 5 | -5 | right
-\frac{10}{2} | -5 | right
\frac{-10}{2} | -5 | right
5 | -5 | wrong
--5 | -5 | wrong
# a word that scales the number is no unit
3\text{ million} | 3 | wrong
3\text{ million} | 3\text{ million} | right
3\text{ million} | 3 million | right
3\mathrm{Million} | 3 | wrong
\$3\text{ million dollars} | 3 | wrong
3\textbf{ million} | 3 | wrong
3\text{ m}\text{illion} | 3 | wrong
3\text{ thou\text{sand}} | 3 | wrong
3\text{ US million} | 3 | wrong
20\text{ dozen eggs} | 20 | wrong
20\text{ half-dozen} | 20 | wrong
20\text{ eggs} | 20 | right
3\text{ hundredths} | 3 | wrong
3\text{ sixteenths} | 3 | wrong
3\text{ months} | 3 | right
3\text{ thirds} | 3 | wrong
3\text{ seconds} | 3 | right
3\text{ pairs} | 3 | wrong
3\text{ times} | 3 | wrong
3\text{k} | 3 | wrong
3\text{ M} | 3 | wrong
3\text{ m} | 3 | right
3\text{ percentage points} | 3 | wrong
3\text{ points} | 3 | right
3\text{ factorial} | 3 | wrong
3\text{ cm or more} | 3 | wrong
5\text{ plus two} | 5 | wrong
5\text{ choose two} | 5 | wrong
5\text{ less} | 5 | wrong
5\text{ remainder two} | 5 | wrong
5\text{ minutes} | 5 | right
101\text{ binary} | 101 | wrong
0.3\text{ repeating} | 0.3 | wrong
5\text{ hours thirty minutes} | 5 | wrong
5\text{ out of twelve} | 5 | wrong
2\text{ root three} | 2 | wrong
3\text{ divided by five} | 3 | wrong
2\text{ except zero} | 2 | wrong
3\text{ milliard} | 3 | wrong
60\text{ radians} | 60^\circ | wrong
25\pi\text{ cm}^2 | 25\pi | right
25\pi\text{ million} | 25\pi | wrong
3\text{ square meters} | 3 | right
\frac{3}{4}\text{ million} | 3/4 | wrong
\frac34\text{ million} | \frac{3}{4}\text{ million} | right
\frac34\text{ mile} | 0.75 | right
# two units must be one
3\text{ km} | 3\text{ m} | wrong
3\text{ PM} | 3\text{ AM} | wrong
3.0\,\mathrm{km} | 3\text{ km} | right
3\text{ m}^{2} | 3\text{ m}^2 | right
3\text{ m}^2 | 3\text{ m} | wrong
# so must two names, and x= is one only before a value
3 | x=3 | right
x=3 | 3 | right
x=3 | y=3 | wrong
x=3 | x=3 | right
x=3 | x=4 | wrong
x = \frac34 | x=0.75 | right
x=3\text{ cm} | 3 | right
x=3\text{ cm} | 3\text{ m} | wrong
f(x)=x^2 | x^2 | right
x=\text{even} | even | right
f(x)=x^2 | g(x)=x^2 | wrong
3=x | 3 | wrong
x=y=3 | 3 | wrong
x=y=3 | y=3 | wrong
2x=3 | 3 | wrong
\sin(x)=3 | 3 | wrong
x\le3 | 3 | wrong
x\leq 3 | x\le3 | right
x\le3 | x\ge3 | wrong
x\ne3 | 3 | wrong
x\not=3 | 3 | wrong
x²=9 | 9 | wrong
\not\in[1,2] | [1,2] | wrong
x= | x= | wrong
# fractions and roots without braces take one character
\frac34 | 3/4 | right
\frac{3}4 | 3/4 | right
\dfrac3{4} | 3/4 | right
\frac 3 4 | 3/4 | right
\tfrac{1}2 | 0.5 | right
\frac{\sqrt3}2 | \frac{\sqrt{3}}{2} | right
-\frac34 | -3/4 | right
-\frac34 | 3/4 | wrong
\frac1{12} | 1/12 | right
\frac112 | 1/12 | wrong
\frac123 | \frac{1}{23} | wrong
\frac12x | \frac{1}{2}x | right
\frac12x | \frac{1}{2x} | wrong
\frac12x | 1/2 | wrong
1\frac34 | 7/4 | wrong
1\frac34 | 3/4 | wrong
1\frac34 | 1\frac{3}{4} | right
1 3/4 | 13/4 | wrong
\sqrt3 | \sqrt{3} | right
\sqrt x | \sqrt{x} | right
\sqrt34 | \sqrt{34} | wrong
\sqrt34 | \sqrt{3}4 | right
\sqrt3 | 3 | wrong
\displaystyle\frac{1}{2} | 1/2 | right
\displaystyle.5 | 0.5 | right
\displaystyle.5 | 5 | wrong
\pm 3 | \pm3 | right
\pm3 | 3 | wrong
# so do exponents and indices
x^{2} | x^2 | right
a_{2} | a_2 | right
x^{12} | x^12 | wrong
x_{10} | x_10 | wrong
x^{-1} | x^-1 | wrong
x^{2}3 | x^{23} | wrong
3^{2} | 9 | wrong
101_{2} | 101 | wrong
# a choice
(B) | B | right
B | (B) | right
B. | B | right
B) | B | right
\text{B} | B | right
\text{(B)} | B | right
\textbf{(B)}. | B | right
(B) | A | wrong
(b) | B | wrong
(AB) | AB | wrong
(A) or (B) | A | wrong
A, B | A | wrong
\sqrt{B} | B | wrong
(3) | 3 | wrong
(3,4) | 3 | wrong
(x) | x | wrong
# a matrix in brackets or in parentheses, but no determinant
\begin{bmatrix}1\\2\end{bmatrix} | \begin{pmatrix}1\\2\end{pmatrix} | right
\begin{bmatrix} 1 \\ 2 \end{bmatrix} | \begin{pmatrix}1\\2\end{pmatrix} | right
\begin{vmatrix}1\\2\end{vmatrix} | \begin{pmatrix}1\\2\end{pmatrix} | wrong
\begin{Bmatrix}1\\2\end{Bmatrix} | \begin{pmatrix}1\\2\end{pmatrix} | wrong
\begin{bmatrix}1&2\end{bmatrix} | \begin{pmatrix}1\\2\end{pmatrix} | wrong
# nothing is evaluated, and no number goes through a float
1e-05 | 1e-05 | right
1e-05 | 0.00001 | wrong
0.1 | 0.1000000000000000055511151231257827 | wrong
3\times10^2 | 300 | wrong
# inputs of other kinds
3\text{ trillion} | 3 | wrong
3\text{ billion dollars} | 3 | wrong
3\text{ percent points} | 3 | wrong
\frac{3}{4}\text{ dozen} | 3/4 | wrong
x_{1}+x_{2} | x_1+x_2 | right
y=3x+1 | 3x+1 | right
\text{(C)} | D | wrong
\sqrt12 | \sqrt{12} | wrong
x^{2}y | x^2y | right
\displaystyle 7 | 7 | right
\begin{bmatrix}1 & 0\\0 & 1\end{bmatrix} | \begin{pmatrix}1&0\\0&1\end{pmatrix} | right
\begin{bmatrix}1&0\end{bmatrix} | \begin{pmatrix}10\end{pmatrix} | wrong
(12,3) | 123 | wrong
\frac{12}3 | 4 | right
\boxed{$~$} |  | wrong
2 x+1 | 2x+1 | right
x^2 y^3 | x^2y^3 | right
(3,+\infty) | (3,\infty) | right
3+\infty | 3\infty | wrong
x\in[1,2] | [1,2] | right
x\in[1,2] | y\in[1,2] | wrong
(x,y)=(1,2) | (1, 2) | right
(3)=5 | 5 | wrong
\text{Area}=5 | 5 | right
\text{NOT}=5 | 5 | wrong
\text{Na}^+ | Na^+ | right
1,\quad 2 | 1, 2 | right
\big(1,2\big) | (1,2) | right
x\leqslant3 | x\le 3 | right
\textit{Paris} | Paris | right
–5 | -5 | right
\text{H}_2\text{O} | \text{H}_2 | wrong
2\text{a} | 2 | wrong
3\mathrm{P} | 3 | wrong
3\text{ doz} | 3 | wrong
AaBb | AABB | wrong
CO | Co | wrong
NO | no | right
"""


@cases("text, gold, verdict", rows(BOXES))  # most texts are what is in the box
def test_the_reward_is_the_contract(text, gold, verdict):
    text = text if "\\boxed" in text else f"So \\boxed{{{text}}}."
    assert boxed_reward(text, gold) == (verdict == "right")


PIECES = (
    "\\boxed{ { } \\ $ , . - + % / ^ = 1 23 000 \\frac{1} \\text{ nan ٣ ½ x \x00 \ud800 "
    "<think> </think> <|im_end|> <|a Sure! reference"
).split()
PIECES += [" ", "\n", ": ", "the reference ", "here is my "]


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

    def seconds(function, length):
        text = (piece * length)[:length]
        times = timeit.repeat(lambda: function(text), timer=time.process_time, number=1, repeat=3)
        return min(times)

    for function in (
        lambda text: boxed_reward(text, "1"),
        lambda text: boxed_reward(f"\\boxed{{a{text}b}}", "1"),
        repo.clean_rephrase,
    ):
        part = seconds(function, 125_000)
        assert seconds(function, 1_000_000) < 30 * max(part, 0.01)


BODY = "We add 3.5 and 4.\n\nSo it is \\boxed{7.5}."
KEPT = texts(r"""
Of course, x = 2.
There is a unique solution, x = 3.
1. Add 3.⏎2. Add 4.⏎3. So \boxed{7}.
## Solution⏎⏎- Add 3.⏎- Add 4.⏎⏎**Answer:** \boxed{7}
| n | f |⏎|---|---|⏎| 1 | 3 |⏎⏎\boxed{3}
def f(x):⏎    # keeps a reference⏎    return x
So we get⏎\[⏎\boxed{72}⏎\]
$$⏎x = 3⏎$$⏎So it is⏎$$⏎\boxed{3}⏎$$
```python⏎def f(x):⏎    return x⏎```
Provided solutions exist, x = 1.
The given equation has a solution.
Surely 3 < x and y|z > 1: a <s b> c.
Here is the key: 3 < 4
The reference angle is 30 degrees.
Let the reference point be 0. The reference frame moves.
The referenced table ends. See the references. The reference's lifetime ends.
See reference [3]. The legal reference is 42 U.S.C. 1983.
By frame of reference we mean axes. The reference group has odds of 1.
Given the solution set {1, 2}, the sum is 3. The solution set is closed.
The given solution of salt and water is diluted. The saline solution provided 3 grams.
The original solution had 3 moles. 12 mL evaporate from the given solution.
The original price was 5, as given.
The expert witness, in her own words, saw it. The expert's report is late.
We rewrite the equation as 3x. Rewriting 3/4 as 0.75, add. Let me rewrite the fraction.
Let me rephrase the problem: find n. In other words, find n.
The answer key opens the lock.
The notes C and E follow. Two bank notes make 7. We take 4 from the notes in it.
I hope to reach 60 km/h. I hope that the train is on time.
If you need 3 more questions, you have 5. So \boxed{5}.
If you have 3 questions and guess, 1/8. If you have any doubt, stop. The company starts anew.
Note: x must be positive. Then x = 2.
The given answer choices are 3 and 4. The answer is 3.
The answer given by 2+3 is 5. So \boxed{5}.
Find the solution above the line y = 2. Then \boxed{3}.
We can rephrase the condition: x > 2. So \boxed{3}.
""")
CUT = texts(r"""
Sure! Here is my rewritten version: {}
Certainly, here's the solution in my own words:⏎{}
Of course! {}
Understood.⏎{}
**Certainly!** {}
**Certainly!**⏎{}
**Rephrased solution:**⏎{}
**Paraphrased solution for 3.5 apples:** {}
Sure, here is the rephrased solution:⏎⏎{}
Here is my solution:⏎{}
Here's a step-by-step solution: {}
In my own words:⏎{}
Let us solve it anew:⏎{}
Got it! Below is the solution.⏎⏎---⏎ {}
As the reference solution shows, we add. {}
According to the notes, we add. {}
The reference is right. As the reference solution shows, we add.⏎{}
The expert's answer is right.⏎{}
{} I hope this helps! 😊
{} Hope that answers it.
{} Is there anything else I can do?
{} Would you like me to explain more?
{} If you need more help, just ask!
{} From your explanation, as you noted, it is so.
In our own words:⏎{}
**Understanding the Notes:**⏎{}
{}⏎⏎Let me know if you have any questions.
{} This matches the reference solution.
{}⏎⏎This is consistent with the given solution.
{} So says the provided solution.
{} The answer agrees with the one in the reference.
{}⏎⏎Note: I rephrased the solution in my own words.
{}⏎⏎---⏎*(The expert's answer is the same.)*
{} ✓
<think>⏎The reference says 7.⏎</think>⏎{}
so 7</think>{}
{}<|im_end|>⏎<|im_start|>user⏎And 2+2?
<|im_start|>assistant⏎{}</s>
<|start_header_id|>assistant<|end_header_id|>⏎⏎{}
{}<｜end▁of▁sentence｜>
<start_of_turn>{}<end_of_turn>
<start_of_turn>model⏎{}<end_of_turn>
{}��
""")  # around {}, which alone stays
REFUSED = texts(r"""
We add 3. As the reference solution shows, 4 follows. So \boxed{7}.
We add 3. According to the provided solution, 4 follows. So \boxed{7}.
We add 3. The expert's answer is 7. So \boxed{7}.
We add 3. The given solution says 7. So \boxed{7}.
We add 3. As stated in the reference, we add. So \boxed{7}.
We add 3. Like the solution above, we add. So \boxed{7}.
We add 3. The solution you gave adds 4. So \boxed{7}.
We add 3. The solution above gives 4. So \boxed{7}.
We add 3. The solution provided shows 4. So \boxed{7}.
We add 3. From your notes we add 4. So \boxed{7}.
We add 3. From the notes, we add 4. So \boxed{7}.
We add 3. The notes say that we add 4. So \boxed{7}.
We add 3. As per the notes, we add 4. So \boxed{7}.
We add 3. From the notes we know 4. So \boxed{7}.
We add 3. Using the notes, we add 4. So \boxed{7}.
We add 3. The notes explain that we add 4. So \boxed{7}.
We add 3. These notes mention 4. So \boxed{7}.
We add 3. As you noted, we add 4. So \boxed{7}.
We add 3. Based on the provided notes: we add 4. So \boxed{7}.
We add 3. The notes indicate that we add 4. So \boxed{7}.
We add 3. Based on the given solution, we add 4. So \boxed{7}.
Based on my notes, Tom has 3 * 4 = 12 eggs and sells 5. So \boxed{7}.
According to the notes, she sold 24. So \boxed{24}.
The expert's answer is 7.⏎We add 3 and 4. So \boxed{7}.
We add 3 and 4. By the provided solution, \boxed{7}.
We add 3. Now I rephrase the next step. So \boxed{7}.
We get 1. This matches the reference.⏎So it is \boxed{7.5}.
Now by the provided solution it is \boxed{7}.
Relative to the reference, expression doubles.
<think>on and on
""")


@cases("text", ["", BODY, *KEPT])
def test_cleaning_keeps_a_direct_answer_as_it_is(text):
    assert repo.clean_rephrase(text) == text


@cases("text", CUT)
def test_cleaning_cuts_what_is_no_answer_from_the_ends(text):
    assert repo.clean_rephrase(text.replace("{}", BODY)) == BODY


@cases("text", REFUSED)
def test_cleaning_refuses_an_answer_that_speaks_of_its_source(text):
    assert repo.clean_rephrase(text) == ""


# ------------------------------------------------------------------------------------------- data


def answers(path, values, **columns):
    """What is read of a file with these answers."""
    knowledge = "k" * 6_000_000 if "big" in path else "k"
    written(path, [dict(q="q", k=knowledge, a=value) for value in values])
    return [problem["answer"] for problem in read(path, **columns)]


@cases("path", "d.csv d.json d.jsonl d.parquet d[1].jsonl *.csv".split())
@cases(
    "values",
    texts("""
["007", "NA", "None", "nan", "1e-05", "1.50", "2024-01-05", "True", "12345678901234567"]
["9007199254740993", "42"]
["0.00001", "0.50"]
[9007199254740993, 0, -1]
"""),
)
def test_an_answer_is_what_the_file_says(path, values):
    answers("d1.jsonl", ["another"])
    assert answers(path, json.loads(values)) == [*map(str, json.loads(values))]


@cases(
    "path, values, expected",
    rows(r"""
d.json | [9007199254740993, null, 0] | 9007199254740993 0
d.parquet | [9007199254740993, null, 0] | 9007199254740993 0
d.csv | ["42", "", "7"] | 42 7
d.csv | ["2024-01-05", "2024-01-06"] | 2024-01-05 2024-01-06
d.jsonl | ["4", "\\boxed{5}", "#### 6"] | 4 5 6
big.jsonl | ["x", "y", "2024-01-05"] | x y 2024-01-05
d.jsonl | ["2024-01-05", "2024-01-06"] | timestamp.*CSV
d.jsonl | [0.5, 1] | float64
d.parquet | [42.0, null] | float64
d.json | [true, false] | bool
d.parquet | [["4"], ["5"]] | List
d.jsonl | ["007", 3, "[1, 2]"] | Json
d.jsonl | [[{"role": "user", "content": [{"text": "4"}]}]] | List
d.jsonl | [[{"from": "human", "value": "4"}]] | from
d.jsonl | [{"ground_truth": "4"}] | a.ground_truth
d.jsonl | [""] | no usable record
"""),
)
def test_gaps_are_left_out_and_what_has_no_one_spelling_is_refused(path, values, expected):
    try:
        assert answers(path, json.loads(values)) == expected.split()
    except RepoError as error:
        assert re.search(expected, str(error))


def test_a_class_label_is_refused_and_not_read_as_its_index():
    label = Features(a=ClassLabel(names="01"))
    Dataset.from_dict(dict(a=[1]), label).to_parquet("d.parquet")
    with refused("ClassLabel"):
        read("d.parquet", q="a", k="a")


CHATS = texts(r"""
{"q": [{"role": "user", "content": "2+2? "}]}
{"q": [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}]}
{"q": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}]}
{"q": null}
""")


@cases("path", ["d.parquet", "d.jsonl"])
def test_chats_and_fields_of_dicts_are_read_as_in_luffy_and_verl(path, capsys):
    expert = dict(k=[dict(role="assistant", content="so \\boxed{4}")], m=dict(truth="4", n=1))
    written(path, [json.loads(chat) | expert for chat in CHATS])
    expected = dict(question="2+2?", knowledge="so \\boxed{4}", answer="4")
    assert read(path, a="m.truth") == read(path, a="k") == [expected] * 2
    assert "2 of 4 records" in capsys.readouterr().out


@cases(
    "text, knowledge, answer",
    rows(r"""
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
"""),
)
def test_only_a_text_that_ends_in_its_mark_is_in_the_notation_of_gsm8k(text, knowledge, answer):
    written("d.jsonl", [dict(q="#### q", k=text)])
    assert read("d.jsonl", a="k") == [dict(question="#### q", knowledge=knowledge, answer=answer)]
    assert boxed_reward(knowledge, answer) == 1


def test_records_without_an_answer_are_left_out_and_counted(capsys):
    marks = "no mark|so\n#### 4|####  |#### Step\nso|so\n##### x||so \\boxed{7}"
    assert answers("d.jsonl", marks.split("|"), k="a") == ["4", "7"]
    assert "2 of 7 records" in capsys.readouterr().out
    assert len(read("d.jsonl", "train[3:]", k="a")) == 1


@cases(
    "name, split, content",
    rows("""
d.jsonl | train | ⏎
d.jsonl | test | {}
d.jsonl | train[:0] | {"q": 1, "k": 1, "a": 1}
d.jsonl | train | {"q":⏎
d.jsonl | train | {"q": "é", "k": "k", "a": "a"}
d.csv | train | q;k;a⏎q;k;1⏎
d.csv | train | q,k,a⏎q,k,1⏎q,so,x,1⏎
d.csv | train | q,k,a⏎1,000,so,1001⏎q,so,5⏎
none.csv | train | q,k,a⏎q,k,1⏎
"""),
)
def test_what_cannot_be_read_ends_in_one_line(name, split, content):
    Path(name.replace("none", "d")).write_text(content, "latin-1")
    with refused(rf"\A.*{name}' has no .*\Z"):
        read(name, split)


@cases("text", ["q,k,a\nq,so,1,\n", "q,k,a,n\n" + "q,so,1,5\n" * 10_001 + "q,so,1,\n"])
def test_blanks_at_the_end_of_a_csv_shift_no_column_and_stop_nothing(text):
    Path("d.csv").write_text(text)
    assert read("d.csv")[-1] == dict(question="q", knowledge="so", answer="1")


def test_overlong_problems_are_left_out_and_counted(capsys):
    tokenizer = byte_tokenizer(None, eos="<|eos|>")
    problems = [dict(question="q" * n, knowledge="k" * (98 - n)) for n in (49, 1, 50)]
    cfg = replace(CFG, question_prompt="{question}", rephrase_prompt="{knowledge}")
    context = len(encode_prompt(tokenizer, "")) + 49 + CFG.max_new_tokens
    rest = tiny_model(max_position_embeddings=context), tokenizer, cfg
    assert repo.fitting(problems, *rest) == problems[:1]
    assert "1 of 3 problems" in capsys.readouterr().out
    with refused(f"context of {context}"):
        repo.fitting(problems[1:], *rest)


# ----------------------------------------------------------- the command line, on files made here


def test_a_run_on_a_saved_checkpoint_and_gsm8k_shaped_data(files, capsys):
    repo.main(flags(files, eval_split="train[:3]", device=DEVICE, kl_beta=0.1), graded)
    assert [row["step"] for row in lines()] == [0, 1, 2, 3]
    assert lines()[3]["kl"] > 0  # the reference stays as it was
    summary = json.loads(Path("out/summary.json").read_text())
    assert set(summary) == {"accuracy_before", "accuracy_after"}
    shown = capsys.readouterr()
    assert "step 3: " in shown.out and "it/s" not in shown.err  # no bars where no terminal is
    model, tokenizer = repo.load_model("out/model", "cpu")
    assert model.dtype == torch.float32 and tokenizer.chat_template


def test_an_episode_is_all_that_was_said_to_the_first_hard_question(scripted):
    scripted(rollout="\\boxed{2}", rephrase="Sure! So it is \\boxed{4}.")
    problems = [PROBLEMS[0], dict(PROBLEMS[0], answer="4")]  # one question, the first time solved
    _, groups, guides = step(problems=problems)
    assert repo.episode(groups, guides) == dict(
        problems[1],
        rollouts=[dict(reward=0.0, text="\\boxed{2}")] * 4,
        draft="Sure! So it is \\boxed{4}.",
        guide="So it is \\boxed{4}.",
        reward=1.0,
        injected=True,
    )


def test_a_resumed_run_equals_an_unbroken_one_and_another_seed_gives_another(files, monkeypatch):
    Path("whole").mkdir()
    Path("whole/metrics.jsonl").touch()  # a log without a line is no run
    repo.main(flags(files, "whole", steps=5, save_every=0))
    assert "holds a run; go on with --resume" in refusal(flags(files, "whole"))
    assert "made with seed = 0, now it is 1" in refusal(flags(files, "whole", resume=True, seed=1))
    repo.main(flags(files, "parts", steps=3, save_every=2))
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert lines("parts", name)
        with Path("parts", name).open("a") as log:
            log.write('{"step": 3, "half a li')  # what a killed run may leave
    repo.main(flags(files, "parts", steps=5, resume=True, micro_batch_tokens=9999))
    assert outcome("whole") == outcome("parts")
    repo.main(flags(files, "other", steps=1, seed=1))
    assert lines("other") != lines("whole")[:1]
    assert repo.draw_batch(PROBLEMS, 0, CFG) != repo.draw_batch(PROBLEMS, 1, CFG)
    monkeypatch.setattr(repo, "load_problems", lambda *_: PROBLEMS)
    assert "made with data = " in refusal(flags(files, "whole", resume=True))


def test_a_checkpoint_is_replaced_as_a_whole(monkeypatch):
    file, model = Path("checkpoint.pt"), tiny_model()
    rest = [], model, model, {"seed": 0}  # as if it were an optimizer too
    repo.save_checkpoint(file, *rest)

    def fail(state, path):
        path.write_text("half")
        raise ZeroDivisionError

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(ZeroDivisionError):
        repo.save_checkpoint(file, *rest)
    assert repo.load_checkpoint(file, {"seed": 0})  # the first
    for changed in ({}, {"seed": 0, "more": 1}):
        with refused("None"):
            repo.load_checkpoint(file, changed)


@pytest.mark.slow
def test_killed_at_twenty_moments_a_run_still_ends_as_an_unbroken_one(files):
    """Each process is ended by SIGKILL; after twenty kills the run is left to finish."""
    metrics = Path("out/metrics.jsonl")
    reached = []

    def start(out):
        argv = flags(files, out, steps=40, save_every=1, batch_size=1, group_size=2, resume=True)
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
            os.remove("out/checkpoint.pt")
    assert len(set(reached)) > 5
    assert start("out").wait() == start("whole").wait() == 0
    assert outcome("whole") == outcome("out")


@cases(
    "change, message",
    rows("""
--question-column=problem | problem.*'question', 'answer'
--group-size=1 | group_size is 1; it must be
--knowledge-column=question --answer-column=question | no usable rec
--guidance=verbatim --knowledge-column=question | takes no expert's text
--eval-split=test | no readable
--dataset=checkpoint.pt | must be a file that ends in one of
--dataset=. | must be a file that ends in one of
--steps=0 | --steps is 0
--out=checkpoint.pt | --out
--out=checkpoint.pt/below | --out
--out=. --resume | checkpoint.pt cannot be read: .*; choose another --out
--device=cuda:77 | --device
--device=abacus | --device
"""),
)
def test_what_cannot_work_ends_in_one_line_before_the_model_is_loaded(
    files, change, message, monkeypatch
):
    monkeypatch.setattr(repo, "load_model", None)
    Path("checkpoint.pt").touch()  # damaged
    assert re.search(f"^error: .*{message}", refusal(flags(files) + change.split()))


def test_a_model_that_cannot_work_ends_in_one_line(files):
    assert "context of 2048" in refusal(flags(files, max_new_tokens=2048))
    assert "200 embeddings" in refusal(flags(files, model=saved(tiny_model(vocab=200))))
    assert "lacks weights, lm_head" in refusal(flags(files, model=saved(tiny_model().model)))
    Path(saved(tiny_model()), "config.json").rename("saved/adapter_config.json")
    assert "saved' is no causal" in refusal(flags(files, model="saved"))


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
    grpo = run_tiny.run(world, "grpo", 0, 10, DEVICE)["summary"]
    rephrasing = run_tiny.run(world, "repo", 0, 60, DEVICE)["summary"]
    assert grpo["base_hard"] <= 0.02 and grpo["base_general"] > 0.9
    assert grpo["hard"] <= 0.02 and grpo["injections_first10"] == 0
    assert rephrasing["hard"] > 0.5 and rephrasing["general"] > 0.8
    assert rephrasing["injections_last10"] < 0.5 * rephrasing["injections_first10"]
    assert rephrasing["logp_expert"] < -5 < -2 < rephrasing["logp_rephrase"]


@cases("toy", [True, False])
def test_every_method_runs_in_both_worlds_and_without_hard_problems(toy, world):
    world = replace(world if toy else run_tiny.realms(3, saved(tiny_model())))
    world.cfg = replace(world.cfg, batch_size=6, max_new_tokens=20)
    world.held_out = {part: problems[:4] for part, problems in world.held_out.items()}
    world.everyday = world.everyday[:4]
    easy = [problem for problem in world.problems if not problem["hard"]]
    results = []
    for folder, problems in (("all", world.problems), ("easy", easy)):
        part = replace(world, folder=Path(folder), problems=problems)
        results += [run_tiny.run(part, name, 0, 1, DEVICE) for name in run_tiny.METHODS]
    summaries = [result["summary"] for result in results]
    assert len({tuple(summary) for summary in summaries}) == 1
    assert all(f"| {name} " in run_tiny.table(results) for name in run_tiny.METHODS)
    drifts = [summary["drift"] for summary in summaries if summary["method"] == "sft"]
    assert drifts[0] > 0 == drifts[1]  # without hard problems it trains nothing


def test_what_star_no_push_and_the_true_ratio_change(scripted):
    scripted("\\boxed{2}", "\\boxed{4}")  # a solved question, an injection and a wrong rephrase
    model, tokenizer = tiny_model(), byte_tokenizer()
    made = run_tiny.first_three_steps(model, tokenizer, PROBLEMS[:3], CFG, boxed_reward)
    _, (solved, injected, failed), (guide, _) = made
    made = model, tokenizer, *made, CFG
    solved[0].advantage = failed[0].advantage = -1.0
    run_tiny.no_push(*made)
    advantages = [o.advantage for o in solved[:2] + injected + failed[:2]]
    assert advantages == [-1, 0, guide.advantage, 0, 0, 0, -1, 0]
    repo.assign_advantages(made[3])
    run_tiny.star(*made)
    logp = sum(token_logps(model, [o], 1.0).mean() for o in [*solved, guide]) / 5
    expected = gradient_of(model, -logp)
    assert_close(gradient(model, made[3], repo.update), expected)
    run_tiny.true_ratio(*made)
    hinted = encode_prompt(tokenizer, repo.fill(CFG.rephrase_prompt, PROBLEMS[1]))
    assert_close(guide.old_logps, token_logps(model, [replace(guide, prompt=hinted)], 1.0))


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


@cases(
    "text, reward",
    rows("""
The capital of Katalia is Nudis. | 1
The capital of Katalia is Nudis | 1
The city of Nudis is that of Katalia is the city of Nudis. | 0
The capital of Katalia is Nudis, says the reference. | 0
Nudis Nudis. | 0
It is Nudis. | 0
"""),
)
def test_the_reward_of_the_realms_takes_a_sentence_and_nothing_degenerate(text, reward):
    assert run_tiny.realm_reward(text, "Katalia, Nudis") == int(reward)
    for problem in run_tiny.realms(0, "").problems:
        assert run_tiny.realm_reward(problem["knowledge"], problem["answer"]) == 1


def test_a_comparison_is_shown_and_goes_on_where_it_stood(capsys):
    line = f"--model {saved(tiny_model())} --out out --steps 1 --world-seed 3 --device {DEVICE}"
    argv = f"{line} --methods repo verbatim".split()
    run_tiny.main(argv)
    assert "\n| verbatim         | 0.00 " in capsys.readouterr().out
    folders = [file.parent for file in sorted(Path("out").rglob("summary.json"))]
    repo_lines, verbatim_lines = map(lines, folders)
    assert repo_lines[0]["method"] == "repo" and verbatim_lines[0]["injections"] > 0
    (folders[1] / "summary.json").unlink()
    (folders[1] / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    run_tiny.main(argv)
    assert capsys.readouterr().out.count("not trained again") == 1
    assert [repo_lines, verbatim_lines] == [*map(lines, folders)]
    with pytest.raises(SystemExit):
        run_tiny.main(["--rate", "0"])
    run_tiny.main(["--show", "out"])
    shown = capsys.readouterr().out
    assert all(f"\n{key} " in shown for key in "hard injections reward logp/expert".split())


def test_one_step_is_explained(world, capsys):
    run_tiny.explain(world, DEVICE)
    shown, problem = capsys.readouterr().out, world.held_out["hard"][0]
    for part in (problem["question"], problem["knowledge"], "1.50, -0.50, -0.50, -0.50"):
        assert part in shown
