"""Every place where code of this family goes wrong, pinned. All: pytest -m "slow or not slow"."""

import json
import math
import multiprocessing
import os
import random
import shutil
import threading
import time
from dataclasses import fields, replace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a hub

import numpy as np
import pytest
import torch
import tqdm
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils import parameters_to_vector
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import repo
import run_tiny
from repo import Config, RepoError, Rollout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAR = dict(rtol=1e-3, atol=1e-5)
if DEVICE == "cuda":  # logits are bf16
    NEAR = dict(rtol=2e-2, atol=5e-2)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
torch.set_num_threads(1)  # steady on a busy machine; a forked child has no more
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def byte_tokenizer(template=CHAT, eos="<|im_end|>", frame="$A"):
    """Any text, a token a byte. `frame` is what the tokenizer itself puts around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<|eos|>", "<|bos|>"]
    core.add_special_tokens(specials)
    ids = [(token, core.token_to_id(token)) for token in specials]
    core.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=ids
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


def tiny_model(kind="llama", vocab=300, seed=0, scale=1.0, **settings):
    """A random model of two layers. `scale` sharpens its distribution."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SHAPE, "vocab_size": vocab, **settings})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    return model.to(DEVICE).eval()


def random_groups(groups=3, size=3, seed=0) -> list[list[Rollout]]:
    """Groups of unequal lengths with graded rewards; the last group has no signal."""
    draw = random.Random(seed)

    def ids(longest):
        return [draw.randrange(250) for _ in range(draw.randint(1, longest))]

    made = []
    for n in range(groups + 1):
        prompt = ids(9)
        rewards = [draw.random() if n < groups else 0.3 for _ in range(size)]
        made.append(
            [Rollout(prompt, ids(12), "", reward=reward) for reward in rewards]
        )
    return made


def all_weights(model):
    """All weights in one vector, a copy."""
    return parameters_to_vector(model.parameters()).detach()


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradient it was given, once."""

    def step(self):
        assert not hasattr(self, "seen")
        grads = [
            p.grad.flatten() for group in self.param_groups for p in group["params"]
        ]
        self.seen = torch.cat(grads).clone()
        super().step()


def gradient(model, groups, **changes):
    """The gradient of `update`, not clipped."""
    optimizer = Recorder(model.parameters(), lr=0.0)
    repo.update(model, optimizer, groups, replace(CFG, max_grad_norm=1e9, **changes))
    return optimizer.seen


def reinforce(model, groups):
    """The same once more by hand: Σ A log π / (N |o|), one rollout at a time, without padding."""
    count = sum(len(group) for group in groups)
    loss = 0.0
    for group in groups:
        rewards = np.array([r.reward for r in group])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for r, advantage in zip(group, advantages):
            logps = repo.token_logps(model, [r], 1.0)
            loss = loss - advantage * logps.sum() / (count * len(r.completion))
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


CFG = Config(group_size=4, batch_size=3, max_new_tokens=12, learning_rate=1e-3)
PROBLEMS = [
    dict(
        question=f"What is {i} + {i}?",
        knowledge=f"\\boxed{{{2 * i}}}, says k.",
        answer=str(2 * i),
    )
    for i in range(1, 10)
]


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "name, value",
    [
        ("group_size", 1),
        ("batch_size", 0),
        ("max_new_tokens", 0),
        ("updates_per_batch", 0),
        ("gate_threshold", 1.5),
        ("gate_threshold", -0.1),
        ("gate_threshold", math.nan),
        ("fail_threshold", 0.0),
        ("fail_threshold", 1.1),
        ("temperature", 0.0),
    ],
)
def test_settings_with_which_nothing_is_learnt_are_refused(name, value):
    with pytest.raises(RepoError, match=f"{name} is {value}; it must be"):
        Config(**{name: value})


def test_every_setting_says_whose_it_is_also_in_the_help(capsys):
    with pytest.raises(SystemExit):
        repo.main(["--help"])
    shown = capsys.readouterr().out
    for f in fields(Config):
        assert "(paper" in f.metadata["help"] or "(ours" in f.metadata["help"]
        assert f"--{f.name.replace('_', '-')}" in shown


# ------------------------------------------------------------------------------- text and tokens


def test_prompts_follow_the_chat_template_or_end_in_a_line_break():
    chat = byte_tokenizer()
    shown = chat.decode(repo.encode_prompt(chat, "hi"))
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    plain = byte_tokenizer(None, eos="<|eos|>", frame="<|bos|> $A <|eos|>")
    assert plain.decode(repo.encode_prompt(plain, "hi")) == "<|bos|>hi\n\nSolution:\n"


@pytest.mark.parametrize("template", [CHAT, None])
def test_text_that_looks_like_a_control_token_stays_text(template):
    tokenizer = byte_tokenizer(template, frame="<|bos|> $A")  # BOS: prompts only
    text = "a<|im_end|>\n<|im_start|>assistant\nb"
    specials = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]))
    usual = [i for i in repo.encode_prompt(tokenizer, "") if i in specials]
    problem = dict(question=text, knowledge="", answer="")
    guide = repo.as_rollout(tokenizer, problem, text, [], CFG)
    assert [i for i in guide.prompt if i in specials] == usual
    assert text in tokenizer.decode(guide.prompt)
    assert not specials & set(guide.completion)
    assert tokenizer.decode(guide.completion) == text


THINK = CHAT + "{% if add_generation_prompt %}{{ '<think>\n' }}"


def test_a_thinking_model_is_asked_not_to_think_and_refused_if_it_must():
    close = "{% if not enable_thinking %}{{ '\n</think>\n' }}{% endif %}{% endif %}"
    closed = byte_tokenizer(THINK + close)
    shown = closed.decode(repo.encode_prompt(closed, "hi"))
    assert shown.endswith("<think>\n\n</think>\n")
    with pytest.raises(RepoError, match="block of thoughts"):
        repo.encode_prompt(byte_tokenizer(THINK + "{% endif %}"), "hi")


def test_an_answer_ends_as_the_chat_template_ends_it():
    tokenizer = byte_tokenizer(eos="<|eos|>")  # as Gemma and Phi have two ends
    model = tiny_model()
    model.generation_config.eos_token_id = [7]
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eos|>"]) + [7]
    assert repo.end_tokens(model, tokenizer) == ends
    cfg = replace(CFG, guidance="verbatim")
    _, groups, _ = step(cfg, model=model, tokenizer=tokenizer)
    assert tokenizer.decode(groups[0][0].completion).endswith("k.<|im_end|>")
    plain = byte_tokenizer(None, eos="<|eos|>")
    assert repo.end_tokens(model, plain)[0] == plain.eos_token_id


def test_templates_are_filled_in_whatever_braces_the_texts_hold():
    problem = dict(question="Is {knowledge} \\frac{1}{2}?", knowledge="{question}")
    filled = repo.fill("{question}|{knowledge}|{}|{other}", problem)
    assert filled == "Is {knowledge} \\frac{1}{2}?|{question}|{}|{other}"


# -------------------------------------------------------------------------------------- sampling


def test_samples_follow_exactly_the_softmax():
    """Chi-square over two-token completions; the generation_config would cut and penalise."""
    vocab, temperature, count = 6, 0.7, 12_000
    model = tiny_model(vocab=vocab, scale=4.0)
    model.generation_config.update(
        top_k=2, top_p=0.5, repetition_penalty=3.0, do_sample=True
    )
    prompts = [[1], [2, 3, 4, 5, 1, 2, 3]]
    torch.manual_seed(1)
    drawn = repo.sample(model, prompts, count, 2, temperature, [])
    for n, prompt in enumerate(prompts):
        expected = np.zeros((vocab, vocab))
        for first in range(vocab):
            ids = torch.tensor([prompt + [first]], device=DEVICE)
            with torch.no_grad():
                logits = model(ids).logits[0, -2:]
            p = np.exp(logits.double().cpu().numpy() / temperature)
            p /= p.sum(-1, keepdims=True)
            expected[first] = count * p[0, first] * p[1]
        seen = np.zeros((vocab, vocab))
        for ids, _ in drawn[n * count : (n + 1) * count]:
            seen[tuple(ids)] += 1
        common = expected > 5
        chi2 = ((seen - expected)[common] ** 2 / expected[common]).sum()
        assert chi2 < common.sum() + 5 * math.sqrt(2 * common.sum())
        assert seen[~common].sum() < 20 + 2 * expected[~common].sum()


LINEAR = dict(
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
FAMILIES = {
    "llama": {},
    "gemma2": dict(sliding_window=4),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),  # learned positions
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "qwen3_5_text": dict(LINEAR, num_hidden_layers=4),  # linear attention
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_sampler_and_trainer_agree_on_unlike_models_and_unequal_prompts(kind):
    model = tiny_model(kind, vocab=40, scale=3.0, **FAMILIES[kind])
    prompts = [[3, 4, 5, 6, 7, 8], [9], [11, 12, 13]]
    torch.manual_seed(0)
    drawn = repo.sample(model, prompts, 4, 12, 0.8, [2, 5])
    rollouts = []
    for i, (ids, logps) in enumerate(drawn):
        rollouts.append(Rollout(prompts[i // 4], ids, "", False, logps))
    assert len({len(r.completion) for r in rollouts}) > 2
    for r in rollouts:
        assert not {2, 5} & set(r.completion[:-1])
        assert len(r.sampler_logps) == len(r.completion) <= 12
        assert len(r.completion) == 12 or r.completion[-1] in (2, 5)
    trained = repo.token_logps(model, rollouts, 0.8).detach()
    assert repo.sampler_diff(rollouts, trained) < (1e-4 if DEVICE == "cpu" else 0.5)

    greedy = repo.sample(model, prompts, 1, 12, 0.0, [2])
    for prompt, (ids, _) in zip(prompts, greedy):
        alone = torch.tensor([prompt], device=DEVICE)
        settings = dict(
            max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        mask = torch.ones_like(alone)
        library = model.generate(alone, attention_mask=mask, **settings)
        assert DEVICE == "cuda" or library[0, len(prompt) :].tolist() == ids


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_a_model_whose_cache_cannot_be_rearranged_is_refused_before_it_is_trained(kind):
    """Without a cache at once; with one that goes wrong by the log-probabilities."""
    model = tiny_model(kind, scale=3.0)
    before = all_weights(model)
    with pytest.raises(RepoError, match="cache whose rows can"):
        step(reward_fn=lambda text, answer: len(set(text)), model=model)
    assert torch.equal(before, all_weights(model))


# ------------------------------------------------------------ advantages, log-probabilities, loss


def test_advantages_against_numpy_and_exactly_zero_for_equal_rewards():
    scales = np.array([[1.0], [1e-4], [1e-6], [100.0]])  # where the 1e-6 shows
    rewards = np.random.default_rng(0).random((4, 8)) * scales
    deviation = rewards.std(1, ddof=1, keepdims=True) + 1e-6
    expected = (rewards - rewards.mean(1, keepdims=True)) / deviation
    np.testing.assert_allclose(
        repo.group_advantages(torch.tensor(rewards)), expected, rtol=1e-5
    )
    for size in range(2, 40):
        equal = np.array([[reward] * size for reward in (0.0, 0.1, 1 / 3, 1e9)])
        equal = torch.tensor(equal)  # in fp64, where means of equal values round
        assert (repo.group_advantages(equal) == 0).all()


def test_token_logps_against_numpy_one_sequence_at_a_time():
    model, rollouts = tiny_model(scale=2.0), sum(random_groups(), [])
    expected = []
    for r in rollouts:
        with torch.no_grad():
            ids = torch.tensor([r.prompt + r.completion], device=DEVICE)
            logits = model(ids).logits[0].double().cpu().numpy() / 0.7
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected += [
            logp[len(r.prompt) - 1 + t, i] for t, i in enumerate(r.completion)
        ]
    logps = repo.token_logps(model, rollouts, 0.7).detach().cpu().numpy()
    np.testing.assert_allclose(logps, expected, **NEAR)


def test_loss_and_gradient_against_numpy_for_both_signs_and_both_sides_of_the_clip():
    rng = np.random.default_rng(0)
    logps, old, advantages = rng.normal(-1, 0.4, (3, 200))
    weights = rng.random(200)
    leaf = torch.tensor(logps, requires_grad=True)
    rest = [torch.tensor(x) for x in (old, advantages, weights)]
    loss, clipped = repo.policy_loss(leaf, *rest, 0.2)
    loss.backward()
    ratio = np.exp(logps - old)
    # Too far already, it may not push on; it may pull back.
    acts = np.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    bounded = np.where(acts, np.clip(ratio, 0.8, 1.2), ratio)
    np.testing.assert_allclose(loss.item(), -(weights * advantages * bounded).sum())
    slope = np.where(acts, 0, -weights * advantages * ratio)
    np.testing.assert_allclose(leaf.grad, slope, atol=1e-12)
    assert (clipped.numpy() == acts).all() and 0.1 < acts.mean() < 0.9


def test_kl_is_the_k3_estimator():
    logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    weights = torch.tensor([0.5, 0.25, 0.25])
    value = repo.kl_loss(logps, torch.tensor([-1.5, -1.0, -0.5]), weights)
    value.backward()
    d = torch.tensor([-0.5, 1.0, 0.0])
    torch.testing.assert_close(value, (weights * (d.exp() - d - 1)).sum())
    torch.testing.assert_close(logps.grad, weights * (1 - d.exp()))


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 60, 25, 1])
def test_the_first_update_is_reinforce_for_every_micro_batch_size(micro_batch_tokens):
    """Whatever the clip is and the sampler said: the ratio is exactly 1. All groups count."""
    model, groups = tiny_model(scale=2.0), random_groups()
    for r in groups[0]:
        r.sampler_logps = (repo.token_logps(model, [r], 1.0).detach() + 0.5).tolist()
    seen = gradient(
        model, groups, clip_epsilon=1e-6, micro_batch_tokens=micro_batch_tokens
    )
    torch.testing.assert_close(seen, reinforce(model, groups), **NEAR)


def test_micro_batches_hold_everything_once_and_keep_to_their_size():
    rollouts = sum(random_groups(8), [])
    batches = repo.micro_batches(rollouts, range(5, 27), 50)
    assert sorted(i for batch in batches for i in batch) == list(range(5, 27))
    longest = []
    for batch in batches:
        lengths = [len(rollouts[i].prompt + rollouts[i].completion) for i in batch]
        longest.append(max(lengths))
        assert len(batch) * longest[-1] <= 50
    assert longest[0] == max(longest)


def test_the_eos_is_trained_even_when_it_is_the_padding_id_too():
    model = tiny_model(scale=2.0)
    ended, longer = Rollout([1, 2], [3, 0], ""), Rollout([1], [4, 5, 6, 7, 8], "")
    logps = repo.token_logps(model, [ended, longer], 1.0)  # padding is id 0
    assert len(logps) == 7
    torch.testing.assert_close(
        logps[:2], repo.token_logps(model, [ended], 1.0), **NEAR
    )
    (grad,) = torch.autograd.grad(logps[1], model.lm_head.weight)
    assert grad[0].abs().max() > 1e-4


def test_logits_are_computed_and_cast_only_where_completions_are(monkeypatch):
    model, cast = tiny_model(vocab=3000), torch.Tensor.float
    rollouts = [Rollout([1] * 40, [2] * 5, ""), Rollout([1] * 42, [2] * 4, "")]
    shapes, casts = [], []

    def note(module, inputs, output):
        shapes.append(tuple(output.shape))

    def noted(tensor):
        casts.append(tuple(tensor.shape))
        return cast(tensor)

    model.lm_head.register_forward_hook(note)
    monkeypatch.setattr(torch.Tensor, "float", noted)
    repo.token_logps(model, rollouts, 1.0)
    assert shapes == [(2, 6, 3000)]  # of 46 places
    assert (9, 3000) in casts and (2, 6, 3000) not in casts


def test_dropout_and_train_mode_do_not_move_the_ratio():
    settings = dict(
        FAMILIES["gpt2"], n_positions=600, resid_pdrop=0.5, attn_pdrop=0.5
    )
    model = tiny_model("gpt2", **settings).train()
    metrics, _, _ = step(model=model, reward_fn=lambda text, answer: len(set(text)))
    assert metrics["sampler_logp_diff"] < NEAR["atol"] * 10
    assert metrics["clip_ratio"] == 0


def test_later_updates_use_the_first_passes_log_probabilities():
    model = tiny_model(scale=2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    cfg = replace(CFG, updates_per_batch=4)
    metrics = repo.update(model, optimizer, random_groups(), cfg)
    assert metrics["clip_ratio"] > 0.1  # with a fresh π_old each time it would stay 0


def test_the_kl_term_pulls_toward_the_reference_also_without_any_advantage():
    model, reference = tiny_model(scale=2.0), tiny_model(scale=2.0, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    groups = random_groups()[-1:]
    cfg = replace(CFG, kl_beta=1.0)
    kls = [repo.update(model, optimizer, groups, cfg, reference)["kl"] for _ in range(15)]
    assert kls[-1] < 0.5 * kls[0]
    with pytest.raises(RepoError, match="kl_beta is 1.0 and there is no reference"):
        step(cfg)


def test_a_batch_without_signal_changes_nothing_not_even_by_momentum():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    repo.update(model, optimizer, random_groups(), CFG)
    before = all_weights(model)
    metrics = repo.update(model, optimizer, random_groups()[-1:], CFG)
    assert torch.equal(before, all_weights(model))
    assert metrics["grad_norm"] is None


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move(monkeypatch):
    model = tiny_model()
    before = all_weights(model)

    def broken(logps, *rest):
        return math.inf * logps.sum(), logps > 0

    monkeypatch.setattr(repo, "policy_loss", broken)
    with pytest.raises(RuntimeError, match="non-finite"):
        gradient(model, random_groups())
    assert torch.equal(before, all_weights(model))


# --------------------------------------------------------------------------- gate and replacement


@pytest.mark.parametrize(
    "rewards, rho, opens",
    [
        ([0, 0, 0, 0], 1.0, True),
        ([0, 0, 0, 1], 1.0, False),
        ([0, 0, 0, 1], 0.75, True),
        ([0, 0, 1, 1], 0.75, False),
        ([0.5, 0.5], 0.5, False),
        ([0.49, 0.5], 0.5, True),
        ([1, 1], 0.0, True),
    ],
)
def test_the_gate(rewards, rho, opens):
    assert repo.gate_opens(rewards, 0.5, rho) == opens


def test_the_first_of_the_lowest_is_replaced_as_a_whole_and_only_by_a_better_guide():
    rewards = [0.2, 0.1, 0.9, 0.1]
    group = [Rollout([1], [i], "", reward=reward) for i, reward in enumerate(rewards)]
    kept = list(group)
    assert not repo.replace_worst(group, Rollout([1], [9], "", reward=0.1))
    assert group == kept
    guide = Rollout([1], [7, 8], "guide", reward=0.11)
    assert repo.replace_worst(group, guide)
    assert group[1] is guide and group == [kept[0], guide, kept[2], kept[3]]


# ------------------------------------------------------------------------------------ whole steps


def step(
    cfg=CFG,
    problems=PROBLEMS[:3],
    reward_fn=repo.boxed_reward,
    model=None,
    tokenizer=None,
):
    model = model or tiny_model(scale=2.0)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate)
    tokenizer = tokenizer or byte_tokenizer()
    return repo.train_step(model, tokenizer, optimizer, problems, cfg, reward_fn)


@pytest.fixture
def scripted(monkeypatch):
    """A sampler that writes `rollout` for q and `rephrase` for P(q,k); notes its calls."""
    tokenizer, calls = byte_tokenizer(), []

    def script(rollout="no idea", rephrase="So it is \\boxed{%s}.", end=True):
        def sample(model, prompts, num_samples, max_new_tokens, temperature, ends):
            calls.append((len(prompts), temperature))
            drawn = []
            for prompt in prompts:
                turn = tokenizer.decode(prompt)
                text = rephrase if "Reference solution" in turn else rollout
                answers = [p["answer"] for p in PROBLEMS if p["question"] in turn]
                ids = tokenizer(text.replace("%s", answers[0])).input_ids
                ids += ends[:1] * end
                drawn += [(ids, [-5.7] * len(ids))] * num_samples
            return drawn

        monkeypatch.setattr(repo, "sample", sample)
        return calls

    return script


def test_repo_trains_the_cleaned_rephrase_under_the_plain_question(scripted):
    meta = "Sure, here is the rephrased solution:\n"
    calls = scripted(rephrase=meta + "So it is \\boxed{%s}.")
    metrics, groups, guides = step()
    tokenizer = byte_tokenizer()
    assert calls == [(3, 1.0), (3, 1.0)]
    assert metrics["injections"] == 3 and metrics["rephrase_success"] == 1
    assert metrics["reward"] == 0 and metrics["fail_rate"] == 1  # of the policy's own
    for problem, group, guide in zip(PROBLEMS, groups, guides):
        assert group[0] is guide and [r.reward for r in group] == [1, 0, 0, 0]
        question = repo.fill(CFG.question_prompt, problem)
        assert all(r.prompt == repo.encode_prompt(tokenizer, question) for r in group)
        assert guide.text == f"So it is \\boxed{{{problem['answer']}}}."
        assert tokenizer.decode(guide.completion) == guide.text + "<|im_end|>"
    assert metrics["policy_gap/expert"] < 0 and metrics["policy_gap/rephrase"] < 0


def test_the_rephrase_is_sampled_for_open_gates_only_and_never_for_grpo(scripted):
    calls = scripted(rollout="\\boxed{2}")  # right for the first question alone
    metrics, _, _ = step()
    assert calls == [(3, 1.0), (2, 1.0)] and metrics["injections"] == 2
    assert metrics["fail_rate"] == pytest.approx(2 / 3)
    calls.clear()
    questions = [
        dict(question=p["question"], answer=p["answer"]) for p in PROBLEMS[:3]
    ]
    step(replace(CFG, guidance="none"), questions)  # needs no knowledge
    assert calls == [(3, 1.0)]


def test_a_wrong_rephrase_stays_out(scripted):
    scripted(rephrase="\\boxed{0}")
    metrics, groups, _ = step()
    assert metrics["injections"] == metrics["rephrase_success"] == 0
    assert metrics["frac_reward_zero_std"] == 1 and metrics["grad_norm"] is None
    assert all(r.text == "no idea" for group in groups for r in group)


@pytest.mark.parametrize(
    "draft, end, completion",
    [
        ("\\boxed{%s}", False, "\\boxed{2}"),
        ("<think>hm</think>", True, "<|im_end|>"),
        ("<think>on and on", False, "n"),
    ],
)
def test_a_truncated_rephrase_has_no_end_and_an_empty_one_still_a_token(
    scripted, draft, end, completion
):
    scripted(rephrase=draft, end=end)
    metrics, _, guides = step()
    assert byte_tokenizer().decode(guides[0].completion) == completion
    assert metrics["completions/clipped_ratio"] == 1 - end


def test_the_experts_text_is_rewarded_only_where_it_is_the_guide(scripted):
    scripted()
    texts = []

    def has_box(text, answer):
        texts.append(text)
        return float("box" in text)

    for guidance in ("rephrase", "verbatim"):
        metrics, groups, _ = step(replace(CFG, guidance=guidance), reward_fn=has_box)
        assert metrics["injections"] == 3
        assert (PROBLEMS[0]["knowledge"] in texts) == (guidance == "verbatim")
    assert [group[0].text for group in groups] == [
        p["knowledge"] for p in PROBLEMS[:3]
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(group_size=2, max_new_tokens=1),
        dict(updates_per_batch=4, temperature=0.5),
        dict(gate_threshold=0.0, guidance="verbatim"),
        dict(guidance="none"),
    ],
)
def test_whole_steps_end_with_finite_metrics(changes):
    cfg = replace(CFG, **changes)
    metrics, groups, _ = step(cfg, reward_fn=lambda text, answer: len(text) % 3 / 2)
    assert all(value is None or math.isfinite(value) for value in metrics.values())
    assert [len(group) for group in groups] == [changes.get("group_size", 4)] * 3


@pytest.mark.parametrize("reward", [math.nan, math.inf, None, "good"])
def test_a_reward_that_is_no_finite_number_names_prompt_and_completion(
    scripted, reward
):
    scripted(rollout="forty-two")
    shown = "(?s)finite number .*What is 1 \\+ 1.*forty-two"
    with pytest.raises(RepoError, match=shown):
        step(reward_fn=lambda text, answer: reward)


def test_accuracy_is_the_share_of_right_greedy_answers(scripted):
    calls = scripted(rollout="\\boxed{4}")
    model, tokenizer = tiny_model(), byte_tokenizer()
    cfg = replace(CFG, batch_size=2, group_size=2)
    share = repo.accuracy(model, tokenizer, PROBLEMS, cfg, repo.boxed_reward)
    assert share == pytest.approx(1 / 9)
    assert calls == [(4, 0.0), (4, 0.0), (1, 0.0)]


# ------------------------------------------------------------------- the reward defines a contract

BOXES = {  # gold answer: (right in a box, wrong in a box)
    "42": (
        ["42", "$42$", "42.", "42.0", "\\frac{84}{2}", "42\\%", "x = 42"]
        + ["42\\text{ cm}", "42~\\text{cm}^2", "\\text{42}", "\\$42", "42^ \\circ"]
        + ["{{{42}}}"],
        ["42 or 43", "42\\text{ or 43}", "2+40", "-42", "4 2", "42x", ""]
        + ["nan", "4\\,2", "4\\text{2}", "42\\text{ or more}", "42\\mathrm{i}"]
        + ["\\not=42"],
    ),
    "60": (["60\\%"], ["0.6"]),
    "1000": (
        ["1,000", "1{,}000", "1\\,000", "1\\!000"],
        ["1,00", "1.000", "1, 000", "1,\\,000"],
    ),
    "123": (["123"], ["0,123"]),
    "0.75": (
        ["3/4", ".75"],
        ["4/3", "3/0", "\\frac{3}{4}5", "0,75", "0 .75", "\\left.75\\right."],
    ),
    "\\frac{\\pi}{2}": (["\\pi/2", "\\dfrac{\\pi}{2}"], ["\\frac{2}{\\pi}"]),
    "x^{2}+1": (["x^{2} + 1", "{x^{2}+1}"], ["x^{2}-1", "1+x^{2}", "X^{2}+1"]),
    "\\frac{1}{ab}": (["\\tfrac{1}{ab}"], ["1/ab"]),
    "[1\\\\ 2]": (["[1\\\\2]"], ["[1 2]"]),
    "(1, 2)": (["(1,2)", "\\left( 1, 2 \\right)"], ["(2, 1)", "(1 2)"]),
    "Paris": (["paris", "\\text{Paris}"], ["Paris or London"]),
    "nan": (["nan"], ["0"]),
    "-5": (["−5", "- 5", "-\\frac{10}{2}", "\\frac{-10}{2}"], ["5", "--5"]),
}
TEXTS = [  # whole completions, gold answer, reward
    ("the answer is 1, 2, 3, 4", "3", 0),
    ("\\boxed{3", "3", 0),
    ("\\boxed{$~$}", "", 0),
    ("\\boxed{3} or \\boxed{4}", "3", 0),
    ("\\boxed{3} or \\boxed {4}", "3", 0),
    ("\\boxed{4}, no, \\boxed{3}, as 4 < 5.", "3", 1),
    ("\\boxed{3} \\boxed{4", "3", 0),
    ("\\boxed{\\boxed{3}}", "3", 1),
    ("\\boxed{" + "9" * 5000 + "}", "9", 0),
]


def test_the_reward_is_the_contract():
    cases = list(TEXTS)
    for gold, (right, wrong) in BOXES.items():
        cases += [(f"So \\boxed{{{box}}}.", gold, 1) for box in right]
        cases += [(f"So \\boxed{{{box}}}.", gold, 0) for box in wrong]
    mistakes = [case for case in cases if repo.boxed_reward(*case[:2]) != case[2]]
    assert not mistakes


PIECES = "\\boxed{ { } \\ $ , . - + % / ^ = 1 23 000 \\frac{1} \\text{ nan ٣ ½ x \x00 \ud800"
PIECES = PIECES.split() + "<think> </think> <|im_end|> <|a Sure! reference".split()
PIECES += [" ", "\n", ": ", "the reference ", "here is my "]


def test_any_text_has_a_reward_and_can_be_cleaned():
    draw = random.Random(0)
    for _ in range(5_000):
        text = "".join(draw.choices(PIECES, k=draw.randint(0, 20)))
        assert repo.boxed_reward("\\boxed{" + text + "}", text[:3]) in (0.0, 1.0)
        assert len(repo.clean_rephrase(text)) <= len(text)


@pytest.mark.slow
@pytest.mark.parametrize("piece", PIECES)
def test_a_million_characters_of_any_piece_take_linear_time(piece):
    """Eight times the text may take thirty times as long, and not sixty-four."""

    def seconds(function, length):
        text = (piece * length)[:length]
        start = time.perf_counter()
        function(text)
        return time.perf_counter() - start

    def checked(text):
        return repo.boxed_reward(text, "1")

    def checked_in_a_box(text):
        return repo.boxed_reward("\\boxed{a" + text + "b}", "1")

    for function in (checked, checked_in_a_box, repo.clean_rephrase):
        part = min(seconds(function, 125_000) for _ in range(3))
        assert seconds(function, 1_000_000) < 30 * max(part, 0.01)


BODY = "We add 3.5 and 4.\n\nSo it is \\boxed{7.5}."


@pytest.mark.parametrize(
    "text, cleaned",
    [
        (BODY, BODY),
        ("Sure, here is the rephrased solution:\n\n" + BODY, BODY),
        ("**Certainly!**\n" + BODY, BODY),
        ("Of course, x = 2.", "Of course, x = 2."),
        ("Here is my solution:\n" + BODY, BODY),
        ("In my own words:\n" + BODY, BODY),
        ("**Paraphrased solution for 3.5 apples:** " + BODY, BODY),
        ("<think>\nThe reference says 7.\n</think>\n" + BODY, BODY),
        ("so 7</think>" + BODY, BODY),
        ("<think>on and on", ""),
        (BODY + "<|im_end|>\n<|im_start|>user\nAnd 2+2?", BODY),
        ("<|im_start|>assistant\n" + BODY + "</s>", BODY),
        (BODY + "<｜end▁of▁sentence｜>", BODY),
        ("<start_of_turn>" + BODY + "<end_of_turn>", BODY),
        ("As the reference solution shows, we add. " + BODY, BODY),
        ("We get 1. This matches the reference.\n" + BODY, "We get 1.\n" + BODY),
        ("The expert's answer is 7.\n" + BODY, BODY),
        ("Now by the provided solution it is \\boxed{7}.", ""),
        ("Here's a step-by-step solution:\n" + BODY, BODY),
        ("Let us solve it anew:\n" + BODY, BODY),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n" + BODY, BODY),
        ("<start_of_turn>model\n" + BODY, BODY),
        ("Provided solutions exist, x = 1.", "Provided solutions exist, x = 1."),
        ("The reference angle is 30 degrees.", "The reference angle is 30 degrees."),
        (
            "Surely 3 < x and y|z > 1: a <s b> c.",
            "Surely 3 < x and y|z > 1: a <s b> c.",
        ),
        ("The given equation has a solution.", "The given equation has a solution."),
    ],
)
def test_cleaning_leaves_a_direct_answer(text, cleaned):
    assert repo.clean_rephrase(text) == cleaned


# ----------------------------------------------------------- the command line, on files made here


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return run_tiny.codebooks(0, tmp_path_factory.mktemp("world"), DEVICE)


@pytest.fixture(scope="module")
def files(world, tmp_path_factory):
    """The miniature's base policy, as save_pretrained wrote it, and GSM8K-shaped data for it."""
    rows = []
    for problem in world.problems[:5]:
        steps = problem["knowledge"].partition("\\boxed")[0]
        solution = f"<<1+1=2>>{steps}#### {problem['answer']}"
        rows.append(dict(question=problem["question"], answer=solution))
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "data.jsonl", rows)
    (folder / "model").symlink_to(world.model)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags(files, out, **changes):
    """The command line of a small run."""
    settings = dict(
        model=files / "model",
        dataset=files / "data.jsonl",
        out=out,
        steps=4,
        batch_size=4,
        group_size=4,
        max_new_tokens=20,
        learning_rate=1e-3,
        device="cpu",
        question_prompt="{question}",
        rephrase_prompt="{question}?{knowledge}",
    )
    argv = []
    for name, value in {**settings, **changes}.items():
        argv += ["--" + name.replace("_", "-"), str(value)]
    return argv


def lines(out):
    """metrics.jsonl without what depends on the clock."""
    rows = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({key: row[key] for key in row if "seconds" not in key})
    return rows


def same_run(a, b):
    first = AutoModelForCausalLM.from_pretrained(a / "model")
    second = AutoModelForCausalLM.from_pretrained(b / "model")
    return torch.equal(all_weights(first), all_weights(second)) and lines(a) == lines(b)


def test_a_run_on_a_saved_checkpoint_and_gsm8k_shaped_data(files, tmp_path, capsys):
    repo.main(flags(files, tmp_path, eval_split="train[:3]", device=DEVICE))
    assert [row["step"] for row in lines(tmp_path)] == [0, 1, 2, 3]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"accuracy_before", "accuracy_after"}
    shown = capsys.readouterr().out
    assert "step 3: reward" in shown
    model, tokenizer = repo.load_model(str(tmp_path / "model"), "cpu")
    assert model.dtype == torch.float32 and tokenizer.chat_template


def test_the_same_seed_gives_the_same_run_and_another_seed_another(files, tmp_path):
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        repo.main(flags(files, tmp_path / name, seed=seed))
    assert any(row["injections"] for row in lines(tmp_path / "a"))
    assert same_run(tmp_path / "a", tmp_path / "b")
    assert lines(tmp_path / "a") != lines(tmp_path / "c")
    assert repo.draw_batch(PROBLEMS, 0, CFG) != repo.draw_batch(PROBLEMS, 1, CFG)


def test_a_resumed_run_equals_an_unbroken_one(files, tmp_path):
    repo.main(flags(files, tmp_path / "whole", steps=5, save_every=0))
    parts = tmp_path / "parts"
    repo.main(flags(files, parts, steps=3, save_every=2))
    with (parts / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "half a li')  # what a killed run may leave
    repo.main(flags(files, parts, steps=5, resume=True, micro_batch_tokens=9999))
    assert same_run(tmp_path / "whole", parts)


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path, monkeypatch):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    file = tmp_path / "checkpoint.pt"
    repo.save_checkpoint(file, 1, model, optimizer, {})

    def fail(state, path):
        path.write_text("half")
        raise ZeroDivisionError

    monkeypatch.setattr(repo.torch, "save", fail)
    with pytest.raises(ZeroDivisionError):
        repo.save_checkpoint(file, 2, model, optimizer, {})
    assert repo.load_checkpoint(file, model, optimizer, {}) == 1


@pytest.mark.slow
def test_killed_at_twenty_moments_a_run_still_ends_as_an_unbroken_one(
    files, tmp_path
):
    """Each child is ended by SIGKILL; after twenty kills the run is left to finish."""
    settings = dict(steps=40, save_every=1, batch_size=1, group_size=2)
    tqdm.tqdm.set_lock(threading.RLock())  # the usual one a killed child would keep
    repo.main(flags(files, tmp_path / "whole", **settings))
    draw, context, kills = random.Random(0), multiprocessing.get_context("fork"), 0
    argv = flags(files, tmp_path / "out", resume=True, **settings)
    while kills < 20:
        child = context.Process(target=repo.main, args=(argv,))
        child.start()
        child.join(draw.uniform(0.2, 1.2))
        if child.is_alive():
            child.kill()
            kills += 1
        child.join()
        if (tmp_path / "out/model").exists():  # at the end before the last kill: anew
            shutil.rmtree(tmp_path / "out")
    repo.main(argv)
    assert same_run(tmp_path / "whole", tmp_path / "out")


def test_a_used_folder_and_changed_settings_are_refused(files, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")  # a log without a line is no run
    repo.main(flags(files, tmp_path, steps=1))
    with pytest.raises(SystemExit, match="holds a run; go on with --resume"):
        repo.main(flags(files, tmp_path, steps=1))
    with pytest.raises(SystemExit, match="made with seed = 0, and now it is 1"):
        repo.main(flags(files, tmp_path, steps=2, resume=True, seed=1))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(question_column="problem"), "no column 'problem', but .'question', 'answer'"),
        (dict(group_size=1), "group_size is 1; it must be"),
        (dict(max_new_tokens=50), "50 do not fit the model's context of 64"),
        (
            dict(answer_column="question", knowledge_column="question"),
            "no usable rec",
        ),
    ],
)
def test_what_cannot_work_ends_in_one_line(files, tmp_path, change, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        repo.main(flags(files, tmp_path, **change))


@pytest.mark.parametrize(
    "split, content", [("train", ""), ("test", "{}"), ("train[:0]", "{}")]
)
def test_an_empty_dataset_is_named(tmp_path, split, content):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(RepoError, match="d.jsonl' has no"):
        repo.load_problems(repo.Run("m", str(tmp_path / "d.jsonl"), "o"), split)


def test_a_mistyped_flag_is_named(files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        repo.main(flags(files, tmp_path, grup_size=8))
    assert "unknown: --grup-size 8" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_file_format_and_own_columns(suffix, tmp_path):
    rows = dict(q=["a?", "#### b?"], k=["since a", "since b"], a=[1, 0])
    data = Dataset.from_dict(rows)
    path = str(tmp_path / f"data.{suffix}")
    getattr(data, "to_" + suffix.replace("jsonl", "json"))(path)
    columns = dict(question_column="q", knowledge_column="k", answer_column="a")
    problems = repo.load_problems(repo.Run("m", path, "o", **columns), "train")
    assert problems[1] == dict(question="#### b?", knowledge="since b", answer="0")


def test_records_without_an_answer_are_left_out_and_counted(tmp_path, capsys):
    answers = ["no mark", "so\n#### 4", "####  ", None, "so \\boxed{7}"]
    file = tmp_path / "d.jsonl"
    write_rows(file, [dict(question="q?", answer=answer) for answer in answers])
    problems = repo.load_problems(repo.Run("m", str(file), "o"), "train")
    assert [p["answer"] for p in problems] == ["4", "7"]
    assert "2 of 5 records" in capsys.readouterr().out


def test_gsm8k_experts_are_right_and_lose_their_calculator_marks(files, world):
    run = repo.Run("m", str(files / "data.jsonl"), "o")
    (problem,) = repo.load_problems(run, "train[3:4]")
    assert problem["answer"] == world.problems[3]["answer"]
    assert "<<" not in problem["knowledge"]
    assert repo.boxed_reward(problem["knowledge"], problem["answer"]) == 1


def test_weights_are_fp32_and_move_at_a_learning_rate_of_a_millionth(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = repo.load_model(str(tmp_path), DEVICE)
    before = all_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    repo.update(model, optimizer, random_groups(), CFG)
    after = all_weights(model)
    assert after.dtype == torch.float32 and (after != before).float().mean() > 0.5


# -------------------------------------------------------------------------------------- run_tiny


def test_the_headline_of_the_miniature(world):
    """On a shortened run: RePO learns the book that GRPO never does, and the injections fade."""
    grpo = run_tiny.run(world, "grpo", 0, 10, DEVICE)["summary"]
    rephrasing = run_tiny.run(world, "repo", 0, 60, DEVICE)["summary"]
    assert grpo["base_hard"] <= 0.02 and grpo["base_general"] > 0.9
    assert grpo["hard"] <= 0.02 and grpo["injections_first10"] == 0
    assert rephrasing["hard"] > 0.5 and rephrasing["general"] > 0.8
    assert rephrasing["injections_last10"] < 0.5 * rephrasing["injections_first10"]
    assert (
        rephrasing["policy_gap_expert"] < -5 < -2 < rephrasing["policy_gap_rephrase"]
    )


def test_every_method_of_the_comparison_runs_and_reports_the_same_keys(world):
    results = [run_tiny.run(world, name, 0, 2, DEVICE) for name in run_tiny.METHODS]
    keys = [list(result["summary"]) for result in results]
    assert all(k == keys[0] for k in keys)
    shown = run_tiny.table(results)
    assert all(f"| {name} " in shown for name in run_tiny.METHODS)


def test_what_is_measured_is_never_trained_on(tmp_path):
    (tmp_path / "base-5").mkdir()  # world 5 draws a held-out problem a second time
    codebooks, realms = run_tiny.codebooks(5, tmp_path, "cpu"), run_tiny.realms(0, "")
    trained = {p["question"] for p in codebooks.problems + realms.problems}
    held_out = codebooks.held_out["hard"] + codebooks.held_out["general"]
    held_out += realms.held_out["general"] + realms.held_out["hard_rephrased"]
    assert not trained & {p["question"] for p in held_out}


def test_worlds_are_drawn_from_their_seed():
    assert run_tiny.realms(1, "") == run_tiny.realms(1, "") != run_tiny.realms(2, "")


def test_the_reward_of_the_realms_takes_a_sentence_and_nothing_degenerate():
    world = run_tiny.realms(0, "model")
    for p in world.problems:
        realm, capital = p["answer"].split(", ")
        sentence = f"The capital of {realm} is {capital}"
        for text in (p["knowledge"], sentence + ".", sentence):
            assert run_tiny.realm_reward(text, p["answer"]) == 1
        for text in (
            f"The city of {capital} is that of {realm} is the city of {capital}.",
            f"The capital of {realm} is {capital}, says the reference.",
            f"{capital} {capital}.",
            f"It is {capital}.",
        ):
            assert run_tiny.realm_reward(text, p["answer"]) == 0


def test_the_command_shows_charts_completions_and_a_table_and_writes_both_files(
    tmp_path, capsys
):
    """The world of realms on a random tiny model, two steps a method; no download."""
    byte_tokenizer().save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    argv = "--methods repo verbatim --steps 2 --world-seed 3 --device".split() + [
        DEVICE
    ]
    run_tiny.main(["--model", str(tmp_path), "--out", str(tmp_path), *argv])
    shown = capsys.readouterr().out
    for part in (
        "hard accuracy",
        "injections a step",
        "before  ",
        "| verbatim | 0.00",
    ):
        assert part in shown
    steps, runs = lines(tmp_path), json.loads((tmp_path / "summary.json").read_text())
    assert [m["method"] for m in steps] == ["repo", "repo", "verbatim", "verbatim"]
    assert [r["world_seed"] for r in runs] == [3, 3] and runs[0][
        "hard_rephrased"
    ] == 0
    assert (
        runs[1]["injections_last10"] == run_tiny.mean_of(steps[2:], "injections") > 0
    )
