"""Every place where code of this family goes wrong, pinned. `pytest` runs the fast tests, `pytest -m "slow or not slow"` all."""

import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a hub

import numpy as np
import pytest
import torch
import tqdm
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

import repo
import run_tiny
from repo import Config, RepoError, Rollout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(__file__).parent
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
torch.set_num_threads(1)  # no slower on models this small, steady on a busy machine, and all that a forked child can have
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def byte_tokenizer(chat_template=CHAT, bos=False) -> PreTrainedTokenizerFast:
    """Any text, a token a byte, as the tokenizers of GPT-2, Llama 3 and Qwen do it without their merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"],
                                        **(dict(bos_token="<|bos|>") if bos else {}))
    if bos:
        core = tokenizer.backend_tokenizer
        core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)])
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(vocab=300, seed=0, scale=1.0, kind=Qwen2Config, **settings):
    """A random model of two layers. `scale` sharpens its distribution."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(
        vocab_size=vocab, **{**dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None), **settings}))
    model.lm_head.weight.data *= scale
    return model.to(DEVICE).eval()


def random_rollouts(count=6, vocab=300, seed=0) -> list[Rollout]:
    """Rollouts of unequal lengths with random tokens, advantages and weights of a whole batch."""
    draw = random.Random(seed)
    ids = lambda low, high: [draw.randrange(vocab) for _ in range(draw.randint(low, high))]
    rollouts = [Rollout(ids(1, 9), ids(1, 12), "", [], reward=draw.random(), advantage=draw.gauss(0, 1)) for _ in range(count)]
    for r in rollouts:
        r.sampled_logps = [math.nan] * len(r.completion)
    weigh(rollouts)
    return rollouts


def weigh(rollouts, aggregation="sequence"):
    for r, weight in zip(rollouts, repo.token_weights([len(r.completion) for r in rollouts], aggregation)):
        r.weight = weight


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it was given and moves by `lr`."""

    def step(self):
        self.seen = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).clone()
        super().step()


def gradient(model, rollouts, cfg):
    optimizer = Recorder(model.parameters(), lr=0.0)
    repo.update(model, optimizer, rollouts, replace(cfg, max_grad_norm=1e9))
    return optimizer.seen


CFG = Config(group_size=4, batch_size=3, max_new_tokens=12, learning_rate=1e-3)
PROBLEMS = [dict(question=f"What is {i} + {i}?", knowledge=f"It is {2 * i}.\n\\boxed{{{2 * i}}}", answer=str(2 * i)) for i in range(1, 10)]


# ------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("wrong", [
    dict(group_size=1), dict(gate_threshold=1.5), dict(gate_threshold=-0.1), dict(gate_threshold=math.nan), dict(temperature=0),
    dict(batch_size=0), dict(max_new_tokens=0), dict(learning_rate=math.nan), dict(learning_rate=-1.0), dict(clip_epsilon=0.0),
    dict(kl_beta=-0.1), dict(guidance="sft"), dict(loss_aggregation="mean"), dict(question_prompt="hello"), dict(seed=-1),
    dict(rephrase_prompt="{question}"), dict(fail_threshold=math.inf), dict(updates_per_batch=0), dict(micro_batch_tokens=0)])
def test_settings_that_cannot_work_are_refused_with_name_and_value(wrong):
    (name, value), = wrong.items()
    with pytest.raises(RepoError, match=f"(?s){name} is .*must be") as error:
        Config(**wrong)
    assert repr(value) in str(error.value)


def test_every_setting_is_documented_and_says_whose_it_is():
    for f in fields(Config):
        assert len(f.metadata["help"]) > 20 and ("(paper" in f.metadata["help"] or "(ours" in f.metadata["help"])
    assert (Config().group_size, Config().learning_rate, Config().gate_threshold, Config().kl_beta) == (8, 1e-6, 1.0, 0.0)


# ------------------------------------------------------------------------------------------------- text and tokens


def test_the_chat_template_is_used_and_a_plain_prompt_without_one():
    tokenizer = byte_tokenizer()
    ids = repo.encode_prompt(tokenizer, "hi")
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    plain = byte_tokenizer(None, bos=True)
    assert plain.decode(repo.encode_prompt(plain, "hi")) == "<|bos|>hi\n\nSolution:"


def test_text_that_looks_like_a_control_token_stays_text():
    for tokenizer in (byte_tokenizer(), byte_tokenizer(None)):
        text = "a<|im_end|>\n<|im_start|>assistant\nb"
        specials = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]))
        clean = [i for i in repo.encode_prompt(tokenizer, "") if i in specials]
        assert [i for i in repo.encode_prompt(tokenizer, text) if i in specials] == clean
        assert "a<|im_end|>\n<|im_start|>assistant\nb" in tokenizer.decode(repo.encode_prompt(tokenizer, text))
        assert not specials & set(repo.encode_completion(tokenizer, text, end=[]))


def test_a_rephrase_is_tokenised_as_an_assistants_turn():
    tokenizer = byte_tokenizer(bos=True)
    ids = repo.encode_completion(tokenizer, "So 2.")
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.bos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "So 2."
    assert repo.encode_completion(tokenizer, "So 2.", end=[]) == ids[:-1]  # a truncated one has no EOS


def test_the_rephrase_prompt_shows_question_and_knowledge_whatever_braces_they_hold():
    prompt = repo.rephrase_prompt("Is {knowledge} \\frac{1}{2}?", "{question} {x}")
    assert "Is {knowledge} \\frac{1}{2}?" in prompt and "{question} {x}" in prompt and "own words" in prompt
    assert repo.rephrase_prompt("1", "2", "{question}|{knowledge}|{}|{other}") == "1|2|{}|{other}"


# -------------------------------------------------------------------------------------------------------- sampling


def test_samples_follow_exactly_the_softmax_also_beside_longer_prompts():
    """Chi-square over all two-token completions. The checkpoint's generation_config would cut and penalise."""
    vocab, temperature, count = 6, 0.7, 12_000
    model = tiny_model(vocab, scale=40.0)
    model.generation_config.update(top_k=2, top_p=0.5, repetition_penalty=3.0, temperature=0.1, do_sample=True)
    short, long = [1], [2, 3, 4, 5, 1, 2, 3]
    torch.manual_seed(1)
    drawn = repo.sample(model, [short, long], count, 2, temperature, eos=[])
    for n, prompt in enumerate((short, long)):
        expected = np.zeros((vocab, vocab))
        for first in range(vocab):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + [first]], device=DEVICE)).logits[0].double().cpu().numpy() / temperature
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            expected[first] = count * p[len(prompt) - 1][first] * p[len(prompt)]
        seen = np.zeros((vocab, vocab))
        for ids, _, _ in drawn[n * count:(n + 1) * count]:
            seen[ids[0], ids[1]] += 1
        common = expected > 5
        rest = max(expected[~common].sum(), 1e-9)
        chi2 = ((seen - expected)[common] ** 2 / expected[common]).sum() + (seen[~common].sum() - rest) ** 2 / max(rest, 1.0)
        df = common.sum()
        assert chi2 < df + 5 * math.sqrt(2 * df), (chi2, df)


def test_a_prompts_samples_do_not_depend_on_its_batch():
    model = tiny_model(scale=30.0)
    prompts = [[5], [7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22]]
    together = repo.sample(model, prompts, 1, 10, 0.0, eos=[0])
    for prompt, (ids, logps, entropy) in zip(prompts, together):
        (alone, alone_logps, alone_entropy), = repo.sample(model, [prompt], 1, 10, 0.0, eos=[0])
        assert ids == alone
        np.testing.assert_allclose(logps, alone_logps, atol=2e-2 if DEVICE == "cuda" else 1e-4)
        expected = model.generate(torch.tensor([prompt], device=DEVICE), max_new_tokens=10, do_sample=False, eos_token_id=0, pad_token_id=0)
        assert DEVICE == "cuda" or ids == expected[0, len(prompt):].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree_and_every_completion_ends_at_its_first_eos(temperature):
    model = tiny_model(20, scale=5.0)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    torch.manual_seed(0)
    drawn = repo.sample(model, prompts, 8, 15, temperature, eos=[0, 1])
    rollouts = [Rollout(prompts[i // 8], ids, "", logps) for i, (ids, logps, _) in enumerate(drawn)]
    assert len({len(r.completion) for r in rollouts}) > 3 and max(len(r.completion) for r in rollouts) == 15
    for r, (_, _, entropy) in zip(rollouts, drawn):
        assert not {0, 1} & set(r.completion[:-1]) and len(r.sampled_logps) == len(entropy) == len(r.completion)
        assert r.completion[-1] in (0, 1) or len(r.completion) == 15
        assert all(0 <= x <= math.log(20) + 1e-4 for x in entropy)
    trained = repo.token_logps(model, rollouts, temperature).tolist()
    np.testing.assert_allclose([x for r in rollouts for x in r.sampled_logps], trained, atol=5e-2 if DEVICE == "cuda" else 1e-5)


def test_any_causal_model_of_transformers_samples_and_scores_alike():
    shape = dict(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    torch.manual_seed(0)
    for kind, settings in {
        "llama": shape, "gpt2": dict(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64), "gpt_neox": shape,
        "mistral": dict(shape, num_key_value_heads=2, sliding_window=4), "phi": shape, "olmo2": shape, "qwen3": dict(shape, num_key_value_heads=2, head_dim=8),
        "gemma2": dict(shape, num_key_value_heads=2, head_dim=8, sliding_window=4),
    }.items():
        config = transformers.AutoConfig.for_model(kind, **settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
        prompts = [[3, 4, 5, 6, 7, 8], [9]]
        drawn = repo.sample(model, prompts, 3, 8, 1.0, eos=[2])
        rollouts = [Rollout(prompts[i // 3], ids, "", logps) for i, (ids, logps, _) in enumerate(drawn)]
        np.testing.assert_allclose([x for r in rollouts for x in r.sampled_logps], repo.token_logps(model, rollouts, 1.0).tolist(),
                                   atol=5e-2 if DEVICE == "cuda" else 1e-4, err_msg=kind)


# ------------------------------------------------------------------------------- advantages, log-probabilities, loss


def numpy_loss(logps, old, advantages, weights, epsilon):
    """The formula a second time, in float64 and with a loop: loss and its gradient by log-probability."""
    loss, slope = 0.0, np.zeros(len(logps))
    for t in range(len(logps)):
        ratio = np.exp(np.float64(logps[t]) - old[t])
        low, high = 1 - epsilon, 1 + epsilon
        capped = (advantages[t] > 0 and ratio > high) or (advantages[t] < 0 and ratio < low)
        loss -= weights[t] * advantages[t] * (min(max(ratio, low), high) if capped else ratio)
        slope[t] = 0.0 if capped else -weights[t] * advantages[t] * ratio
    return loss, slope


def test_advantages_against_numpy():
    rewards = np.random.default_rng(0).random((5, 8)) * [[1.0], [1e-4], [1e-6], [100.0], [1.0]]  # where the 1e-6 shows
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(repo.group_advantages(torch.tensor(rewards)).numpy(), expected, rtol=1e-5)


def test_a_group_of_equal_rewards_has_exactly_no_advantage():
    for size in range(2, 40):
        rewards = torch.tensor([0.0, 1.0, 0.1, 1 / 3, -7.3, 1e9, 0.7], dtype=torch.float64)[:, None].expand(-1, size)
        assert (repo.group_advantages(rewards) == 0).all()


def test_token_logps_against_numpy_one_sequence_at_a_time():
    model, rollouts = tiny_model(scale=5.0), random_rollouts()
    logps = repo.token_logps(model, rollouts, 0.7).detach().cpu().numpy()
    expected = []
    for r in rollouts:
        with torch.no_grad():
            logits = model(torch.tensor([r.prompt + r.completion], device=DEVICE)).logits[0].double().cpu().numpy() / 0.7
        logits = logits - logits.max(-1, keepdims=True)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected += [table[len(r.prompt) - 1 + t, token] for t, token in enumerate(r.completion)]
    np.testing.assert_allclose(logps, expected, atol=5e-2 if DEVICE == "cuda" else 1e-4)


def test_loss_and_gradient_against_numpy_for_both_signs_of_the_advantage():
    rng = np.random.default_rng(0)
    logps, old, advantages, weights = rng.normal(-1, 0.4, 200), rng.normal(-1, 0.4, 200), rng.normal(0, 1, 200), rng.random(200)
    leaf = torch.tensor(logps, requires_grad=True)
    loss, clipped = repo.policy_loss(leaf, torch.tensor(old), torch.tensor(advantages), torch.tensor(weights), 0.2)
    loss.backward()
    expected, slope = numpy_loss(logps, old, advantages, weights, 0.2)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-10)
    np.testing.assert_allclose(leaf.grad.numpy(), slope, rtol=1e-10, atol=1e-12)
    assert (clipped.numpy() == (slope == 0)).all() and 0.1 < clipped.float().mean() < 0.9


def test_the_clip_lets_an_advantage_pull_back_but_not_push_on():
    """r far above 1: A < 0 must still push it down; r far below 1: A > 0 must still pull it up."""
    for log_ratio, advantage, moves in [(1.0, 1.0, False), (1.0, -1.0, True), (-1.0, 1.0, True), (-1.0, -1.0, False)]:
        logp = torch.tensor([log_ratio], requires_grad=True)
        repo.policy_loss(logp, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), 0.2)[0].backward()
        assert bool(logp.grad != 0) == moves


def test_kl_is_the_k3_estimator():
    logps, ref = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True), torch.tensor([-1.5, -1.0, -0.5])
    value = repo.kl_loss(logps, ref, torch.tensor([0.5, 0.25, 0.25]))
    d = (ref - logps).detach().numpy().astype(np.float64)
    np.testing.assert_allclose(value.item(), ((np.exp(d) - d - 1) * [0.5, 0.25, 0.25]).sum(), rtol=1e-6)
    value.backward()
    np.testing.assert_allclose(logps.grad.numpy(), (1 - np.exp(d)) * [0.5, 0.25, 0.25], atol=1e-6)


def test_the_first_update_is_reinforce():
    """With one update a batch the ratio is exactly 1, whatever the clip, and the gradient is that of Σ w A log π."""
    for aggregation in ("sequence", "token"):
        model, rollouts = tiny_model(scale=5.0), random_rollouts()
        weigh(rollouts, aggregation)
        seen = gradient(model, rollouts, replace(CFG, clip_epsilon=1e-6))
        lengths = [len(r.completion) for r in rollouts]
        model.zero_grad()
        objective = 0.0
        for r in rollouts:  # one at a time: no padding, no packing
            scale = 1 / sum(lengths) if aggregation == "token" else 1 / (len(rollouts) * len(r.completion))
            objective = objective - scale * r.advantage * repo.token_logps(model, [r], 1.0).sum()
        objective.backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=2e-3 if DEVICE == "cuda" else 1e-6)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_groups_without_signal_count_in_the_weights_of_a_step(aggregation, monkeypatch):
    monkeypatch.setattr(repo, "end_ids", lambda model, tokenizer: list(range(60)))  # completions of unequal lengths
    model, tokenizer, seen = tiny_model(), byte_tokenizer(), []
    cfg = replace(CFG, loss_aggregation=aggregation, guidance="none")
    reward_fn = lambda text, answer: float(answer == PROBLEMS[0]["answer"] and len(seen.append(text) or seen) % 2)  # one group varies
    keep = lambda model, optimizer, rollouts, cfg, reference: seen.append(rollouts) or {}
    metrics, _, _ = repo.train_step(model, tokenizer, None, PROBLEMS[:3], cfg, reward_fn, update_fn=keep)
    rollouts, lengths = seen[-1], [len(r.completion) for r in seen[-1]]
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3) and len(rollouts) == 12 and len(set(lengths)) > 2
    expected = [1 / (12 * n) for n in lengths] if aggregation == "sequence" else [1 / sum(lengths)] * 12
    np.testing.assert_allclose([r.weight for r in rollouts], expected)


def test_micro_batches_do_not_change_the_gradient():
    for cfg in (CFG, replace(CFG, loss_aggregation="token")):
        model, rollouts = tiny_model(scale=5.0), random_rollouts(9)
        weigh(rollouts, cfg.loss_aggregation)
        whole = gradient(model, rollouts, cfg)
        for tokens in (1, 25, 60):
            assert len(repo.micro_batches(rollouts, tokens)) > 1
            torch.testing.assert_close(gradient(model, rollouts, replace(cfg, micro_batch_tokens=tokens)), whole,
                                       rtol=1e-3, atol=2e-3 if DEVICE == "cuda" else 1e-6)


def test_micro_batches_hold_everything_once_and_keep_to_their_size():
    rollouts = random_rollouts(30)
    lots = repo.micro_batches(rollouts, 50)
    assert sorted(id(r) for lot in lots for r in lot) == sorted(map(id, rollouts))
    assert all(len(lot) * max(len(r.prompt) + len(r.completion) for r in lot) <= 50 for lot in lots)


def test_rollouts_without_advantage_are_skipped_and_still_counted():
    model, rollouts = tiny_model(scale=5.0), random_rollouts(8)
    for r in rollouts[::2]:
        r.advantage = 0.0
    thinned = gradient(model, rollouts, CFG)
    model.zero_grad()
    logps = repo.token_logps(model, rollouts, 1.0)
    per_token = lambda name: torch.tensor([getattr(r, name) for r in rollouts for _ in r.completion], device=DEVICE)
    (-(logps * per_token("advantage") * per_token("weight")).sum()).backward()
    torch.testing.assert_close(thinned, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-3,
                               atol=2e-3 if DEVICE == "cuda" else 1e-6)


def test_the_eos_is_trained_even_when_it_is_the_padding_id_too():
    """The weight of the EOS's logit moves; what is behind it does not count."""
    model = tiny_model(scale=5.0)
    with_eos, longer = Rollout([1, 2], [3, 0], "", [math.nan] * 2), Rollout([1], [4, 5, 6, 7, 8], "", [math.nan] * 5)
    logps = repo.token_logps(model, [with_eos, longer], 1.0)  # padding is id 0 here
    assert len(logps) == 7
    alone = repo.token_logps(model, [with_eos], 1.0)
    torch.testing.assert_close(logps[:2], alone, rtol=1e-3, atol=2e-2 if DEVICE == "cuda" else 1e-5)
    grad, = torch.autograd.grad(logps[1], model.lm_head.weight)
    assert grad[0].abs().max() > 1e-4


def test_logits_are_computed_only_where_completions_can_be_and_never_copied_to_fp32_whole():
    model = tiny_model(vocab=3000)
    rollouts = [Rollout([1] * 40, [2] * 5, "", []), Rollout([1] * 42, [2] * 4, "", [])]
    seen, saved = [], {}
    hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved.__setitem__(t.untyped_storage().data_ptr(), t), t)[1], lambda t: t):
        repo.token_logps(model, rollouts, 1.0)
    hook.remove()
    assert seen[0].shape[1] == 6  # of 46 positions: neither the first 39 of the prompt nor the last token predict a completion's token
    big = [t for t in saved.values() if t.shape[-1:] == (3000,) and t.untyped_storage().data_ptr() != seen[0].untyped_storage().data_ptr()
           and t.dim() > 2]
    assert not big, [t.shape for t in big]


def test_dropout_and_train_mode_do_not_move_the_ratio():
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=600,
                                                        resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    metrics, _, _ = repo.train_step(model, tokenizer, optimizer, PROBLEMS[:2], CFG, lambda text, answer: float(len(set(text))))
    assert metrics["sampler_logp_diff"] < (5e-2 if DEVICE == "cuda" else 1e-4) and metrics["clip_ratio"] == 0


@pytest.mark.parametrize("cfg", [CFG, replace(CFG, micro_batch_tokens=300)])
def test_gradient_checkpointing_changes_no_gradient(cfg):
    model, rollouts = tiny_model(scale=5.0), random_rollouts()
    plain = gradient(model, rollouts, cfg)
    torch.testing.assert_close(gradient(model, rollouts, replace(cfg, gradient_checkpointing=True)), plain, rtol=1e-3, atol=1e-5)
    assert not model.training and len(repo.sample(model, [[1]], 2, 3, 1.0, [])) == 2
    assert model.is_activation_checkpointing  # by the setting alone


def test_later_updates_use_the_first_passes_log_probabilities():
    model, rollouts = tiny_model(scale=5.0), random_rollouts()
    metrics = repo.update(model, torch.optim.SGD(model.parameters(), lr=5.0), rollouts, replace(CFG, updates_per_batch=4))
    assert metrics["clip_ratio"] > 0.1  # with ratios of a fresh π_old each time it would stay 0


def test_the_kl_term_pulls_toward_the_reference_and_trains_rollouts_without_advantage():
    model, reference, rollouts = tiny_model(scale=5.0), tiny_model(scale=5.0, seed=1), random_rollouts()
    for r in rollouts:
        r.advantage = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    kls = [repo.update(model, optimizer, rollouts, replace(CFG, kl_beta=1.0), reference)["kl"] for _ in range(15)]
    assert kls[-1] < 0.5 * kls[0]


# ------------------------------------------------------------------------------------------------ gate and replacement


@pytest.mark.parametrize("rewards, rho, opens", [
    ([0, 0, 0, 0], 1.0, True), ([0, 0, 0, 1], 1.0, False), ([0, 0, 0, 1], 0.75, True), ([0, 0, 1, 1], 0.75, False),
    ([0.5, 0.5], 0.5, False), ([0.49, 0.5], 0.5, True), ([1, 1], 0.0, True)])
def test_the_gate(rewards, rho, opens):
    assert repo.gate_opens(rewards, 0.5, rho) == opens


def test_the_first_of_the_lowest_is_replaced_with_all_that_belongs_to_it():
    group = [Rollout([1], [i], str(i), [0.0], reward=reward) for i, reward in enumerate([0.2, 0.1, 0.9, 0.1])]
    kept = list(group)
    guide = Rollout([1], [7, 8], "guide", [math.nan] * 2, reward=0.5)
    assert repo.replace_worst(group, guide)
    assert group == [kept[0], guide, kept[2], kept[3]] and group[1] is guide


def test_only_a_better_guide_enters_when_verified():
    group = [Rollout([1], [i], "", [0.0], reward=0.0) for i in range(3)]
    assert not repo.replace_worst(group, Rollout([1], [9], "", [0.0], reward=0.0)) and all(r.completion != [9] for r in group)
    assert repo.replace_worst(group, Rollout([1], [9], "", [0.0], reward=0.0), verify=False) and group[0].completion == [9]


# --------------------------------------------------------------------------------------------------------- whole steps


def scripted(monkeypatch, tokenizer, rephrase="So it is \\boxed{%s}.", rollout="no idea"):
    """Replaces the sampler by one that writes `rollout` for a question and `rephrase` for P(q,k); counts its calls."""
    calls = []

    def sample(model, prompts, num_samples, max_new_tokens, temperature, eos):
        calls.append(len(prompts))
        drawn = []
        for prompt in prompts:
            turn = tokenizer.decode(prompt)
            hinted = "Reference solution" in turn
            answer = next((p["answer"] for p in PROBLEMS if p["question"] in turn), "")
            text = (rephrase if hinted else rollout)
            ids = repo.encode_completion(tokenizer, text % answer if "%s" in text else text)
            drawn += [(ids, [-1.0] * len(ids), [0.5] * len(ids))] * num_samples
        return drawn

    monkeypatch.setattr(repo, "sample", sample)
    return calls


def step(cfg=CFG, problems=PROBLEMS[:3], reward_fn=repo.boxed_reward, model=None, **more):
    tokenizer, model = byte_tokenizer(), model or tiny_model(scale=2.0)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate)
    return repo.train_step(model, tokenizer, optimizer, problems, cfg, reward_fn, **more)


def test_repo_injects_the_rephrase_under_the_plain_question(monkeypatch):
    tokenizer = byte_tokenizer()
    calls, seen = scripted(monkeypatch, tokenizer, rephrase="Sure, here is the rephrased solution:\nSo it is \\boxed{%s}."), []
    keep = lambda model, optimizer, rollouts, cfg, reference: seen.extend(rollouts) or {}
    metrics, groups, guides = step(update_fn=keep)
    assert calls == [3, 3] and metrics["injections"] == 3 and metrics["rephrase_success"] == 1.0
    assert metrics["reward"] == 0.0 and metrics["fail_rate"] == 1.0  # as they were before the replacement
    for p, group in zip(PROBLEMS, groups):
        assert [r.reward for r in group] == [1.0, 0.0, 0.0, 0.0] and len({tuple(r.prompt) for r in group}) == 1
        assert tokenizer.decode(group[0].prompt) == tokenizer.decode(repo.encode_prompt(tokenizer, repo.fill(repo.QUESTION_PROMPT, **p)))
        assert "eference" not in tokenizer.decode(group[0].prompt) and group[0].text == f"So it is \\boxed{{{p['answer']}}}."
        assert tokenizer.decode(group[0].completion) == group[0].text + "<|im_end|>"
        np.testing.assert_allclose([r.advantage for r in group], [1.5, -0.5, -0.5, -0.5], atol=1e-5)
    assert [id(r) for r in seen] == [id(r) for group in groups for r in group]
    assert metrics["policy_gap/expert"] < 0 and metrics["policy_gap/rephrase"] < 0


def test_the_rephrase_is_sampled_for_open_gates_only(monkeypatch):
    calls = scripted(monkeypatch, byte_tokenizer(), rollout="\\boxed{2}")  # right for the first question alone
    metrics, _, _ = step()
    assert calls == [3, 2] and metrics["injections"] == 2 and metrics["fail_rate"] == pytest.approx(2 / 3)
    calls.clear()
    step(replace(CFG, guidance="none"))
    assert calls == [3]


def test_a_wrong_rephrase_is_not_injected(monkeypatch):
    scripted(monkeypatch, byte_tokenizer(), rephrase="\\boxed{0}")
    metrics, groups, _ = step()
    assert metrics["injections"] == 0 and metrics["rephrase_success"] == 0.0 and metrics["frac_reward_zero_std"] == 1.0
    assert metrics["grad_norm"] is None and all(r.text == "no idea" for group in groups for r in group)


def test_an_empty_rephrase_is_a_failed_one(monkeypatch):
    scripted(monkeypatch, byte_tokenizer(), rephrase="<think>hm</think>")
    metrics, _, guides = step()
    assert metrics["rephrase_success"] == 0.0 and metrics["injections"] == 0 and guides == [] and metrics["policy_gap/rephrase"] is None


def test_verbatim_injects_the_experts_text(monkeypatch):
    calls = scripted(monkeypatch, byte_tokenizer())
    metrics, groups, _ = step(replace(CFG, guidance="verbatim"))
    assert calls == [3] and metrics["injections"] == 3
    assert [group[0].text for group in groups] == [p["knowledge"] for p in PROBLEMS[:3]]


def test_a_step_raises_the_probability_of_what_was_injected(monkeypatch):
    scripted(monkeypatch, byte_tokenizer())
    model = tiny_model()
    before = None
    for _ in range(4):
        _, groups, _ = step(model=model)
        good = [group[0] for group in groups]
        value = repo.mean_logp(model, good, CFG)
        assert before is None or value > before
        before = value


METRICS = {"reward", "fail_rate", "injections", "rephrase_success", "policy_gap/expert", "policy_gap/rephrase", "entropy",
           "clip_ratio", "frac_reward_zero_std", "grad_norm", "completions/mean_length", "completions/truncated", "sampler_logp_diff",
           "skipped_updates", "loss", "kl", *(f"{what}/{phase}" for what in ("seconds", "tokens_per_second")
                                              for phase in ("sample", "rephrase", "update"))}


def finite(metrics):
    return METRICS <= set(metrics) and all(v is None or math.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("name, cfg, problems, reward_fn", [
    ("plain", CFG, PROBLEMS[:3], lambda text, answer: len(text) % 2),
    ("all rewards equal", CFG, PROBLEMS[:3], lambda text, answer: 1.0),
    ("one prompt, two rollouts, one token", replace(CFG, group_size=2, max_new_tokens=1), PROBLEMS[:1], lambda text, answer: len(text)),
    ("four updates", replace(CFG, updates_per_batch=4), PROBLEMS[:3], lambda text, answer: len(text) % 2),
    ("gate always open, no verification", replace(CFG, gate_threshold=0.0, verify=False), PROBLEMS[:3], repo.boxed_reward),
    ("verbatim", replace(CFG, guidance="verbatim"), PROBLEMS[:3], repo.boxed_reward),
    ("token mean", replace(CFG, loss_aggregation="token", temperature=0.5), PROBLEMS[:2], lambda text, answer: len(text) % 3)])
def test_whole_steps_end_with_finite_metrics(name, cfg, problems, reward_fn):
    metrics, groups, _ = step(cfg, problems, reward_fn)
    assert finite(metrics), metrics
    assert [len(group) for group in groups] == [cfg.group_size] * len(problems)


def test_kl_step_has_finite_metrics():
    metrics, _, _ = step(replace(CFG, kl_beta=0.1), reward_fn=lambda text, answer: len(text) % 2, reference=tiny_model(seed=3))
    assert finite(metrics) and metrics["kl"] > 0


def test_completions_that_are_all_empty(monkeypatch):
    scripted(monkeypatch, byte_tokenizer(), rollout="", rephrase="")
    metrics, groups, _ = step()
    assert finite(metrics) and metrics["completions/mean_length"] == 1 and metrics["completions/truncated"] == 0


def test_completions_that_are_all_truncated():
    metrics, _, _ = step(replace(CFG, max_new_tokens=3), model=tiny_model(258, eos_token_id=257), reward_fn=lambda text, answer: len(text) % 2)
    assert finite(metrics) and metrics["completions/truncated"] > 0.9


def test_a_vocabulary_of_two_tokens():
    model = tiny_model(2, hidden_size=16)
    drawn = repo.sample(model, [[0], [1, 1]], 4, 6, 1.0, eos=[1])
    rollouts = [Rollout([0], ids, "", logps, advantage=(-1.0) ** i, weight=0.1) for i, (ids, logps, _) in enumerate(drawn)]
    metrics = repo.update(model, torch.optim.AdamW(model.parameters(), 1e-3), rollouts, CFG)
    assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


@pytest.mark.parametrize("bad", [lambda t, a: math.nan, lambda t, a: math.inf, lambda t, a: None, lambda t, a: "good", lambda t, a: 1 / 0])
def test_a_reward_that_is_no_number_names_prompt_and_completion(bad, monkeypatch):
    scripted(monkeypatch, byte_tokenizer(), rollout="forty-two")
    with pytest.raises(RepoError, match="(?s)reward function.*finite number.*What is 1 \\+ 1.*forty-two"):
        step(reward_fn=bad)


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    model, rollouts = tiny_model(), random_rollouts()
    rollouts[2].advantage = math.inf
    weights = [p.clone() for p in model.parameters()]
    metrics = repo.update(model, torch.optim.AdamW(model.parameters(), 1e-2), rollouts, CFG)
    assert metrics["skipped_updates"] == 1 and metrics["grad_norm"] is None
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters())) and all(p.grad is None for p in model.parameters())


def test_accuracy_counts_greedy_answers_and_leaves_the_random_state_alone(monkeypatch):
    state = torch.get_rng_state()
    assert repo.accuracy(tiny_model(), byte_tokenizer(), PROBLEMS, CFG) == 0.0
    assert torch.equal(state, torch.get_rng_state())
    scripted(monkeypatch, byte_tokenizer(), rollout="\\boxed{4}")
    assert repo.accuracy(tiny_model(), byte_tokenizer(), PROBLEMS, replace(CFG, batch_size=1, group_size=2)) == pytest.approx(1 / 9)


# ----------------------------------------------------------------------------------------- the checker under attack

# gold answer: (what may stand in the box, what may not)
BOXES = {
    "3": (["3", " 3 ", "3.0", "3.", "03", "+3", "$3$", "\\$3", "$3", "6/2", "\\frac{6}{2}", "\\text{3}", "\\mathbf{3}", "3\\text{ apples}",
           "3 apples", "3 cm", "3\\,\\text{cm}", "x=3", "x = 3", "٣", "３", "\u200b3", "300%", "300\\%", "3e0", "3.000", "**3**", "3 points", "3 times", "3 quarters", "3 more apples", "3 cups of sugar", "3 days a week", "3 PM", "3\\text{ eggs/day}", "3 miles/hour",
           "$$3$$", "\\(3\\)", "= 3", "3 hours per day", "\\text{Total} = 3"],
          ["1, 2, 3", "1,2,3", "3,4", "-3", "−3", "3!", "2+1", "3x", "3\\pi", "3 or 4", "3 and 4", "30", "33", "0.3", "3%", "3 percent", "1/3",
           "three", "", " ", "3^2", "3²", "3i", "3 million", "3 thousand", "3 dozen", "3 1", "3:00", "3e1", "±3", "~", "x", "nan", "inf", "3-0", "(3)(1)",
           "not 3", "3 squared", "\\sqrt{9}", "4-1", "３３", "3;4", "3/0", "0/0", "[3,4]", "3 halves", "3k", "--3", "+-3", "3 3", "3?", "3 times 2", "3n", "3m", "3n^2", "3 sixths", "3 eighths", "3 hours thirty minutes", "3 quadrillion", "3 lakh", "$3M", "3 percent increase",
            "3 per cent 2", "3 eleven", "2=3", "3=4", "1, 3", "3 times x", "3 \\text{or} 4", "$3 cents", "3=3=4"]),
    "1000": (["1,000", "1000", "1000.0", "1{,}000", "1\\,000", "1 000", "1e3", "1E3", "1 \\times 10^3", "10 \\times 10^{2}", "10 \\cdot 10^2", "$1,000",
              "\\$1{,}000.00", "1,000 dollars", "1000.00 USD"],
             ["1,00", "10,00", "1,0000", "100", "1.000", "1,000,000", "1,000.5", "10^3", "1e", "1e4", "1000,", "1, 000", "1 ,000", "1. 000", "1e9999999999", "1k", "1,000 thousand"]),
    "0.75": (["0.75", ".75", "3/4", "\\frac{3}{4}", "\\frac34", "$0.75", "\\dfrac{3}{4}", "\\tfrac{6}{8}", "75%", "75\\%", "75 percent", "\\frac{75}{100}", "7.5e-1",
              "$\\frac{3}{4}$", "0.750", "+0.75", "\\frac{1.5}{2}"],
             ["75", "0.75%", "4/3", "\\frac{4}{3}", "-3/4", "3/4/1", "3\\4", "0,75", "0.7500001", "3 4", "\\frac{3}{}", "\\frac{3}{0}", "3/-4/1", "\\frac{3}{4}m", "\\frac{3}{4}5", "\\frac345"]),
    "50%": (["50%", "50\\%", "0.5", "1/2", "50 %", "\\frac{1}{2}", "50 percent"], ["50", "5%", "0.5%", "500%", "50%%"]),
    "-5": (["-5", "−5", "– 5", "- 5", "-5.0", "-\\frac{10}{2}", "-$5", "$-5", "-5 degrees", "-5^\\circ"], ["5", "--5", "5-", "(5)", "+-5", "-(5+0)"]),
    "1.75": (["1 3/4", "1\\frac{3}{4}", "7/4", "1 \\frac34"], ["13/4", "1 3 4", "1/3/4", "1+3/4"]),
    "$5": (["5", "$5", "\\$5.00", "5 dollars", "5 dollar"], ["€5", "5 euros", "5 cents", "$50", "5 cm"]),
    "5 cm": (["5 cm", "5cm", "5\\text{ cm}", "5\\,\\mathrm{cm}", "5"], ["5 m", "5 cm^2", "50 mm", "5 km"]),
    "90": (["90^\\circ", "90°", "90 degrees", "90^{\\circ}"], ["90^2"]),
    "2n": (["2n", "2 n"[:1] + "n"], ["2", "2 m", "n"]), "4s": (["4s"], ["4", "4 seconds"]), "23": (["23"], ["2**3", "2^3", "2\\!3"]),
    "5 s": (["5 s", "5", "5 S"], ["5 cm", "5 m", "5 ms"]), "2, 100": (["2, 100", "2,100"[:2] + " 100"], ["2 100", "100", "2"]),
    "x^2": (["x^{2}", "x^2", "x²"], ["x2", "2"]), "(B)": (["B", "(B)", "\\text{(B)}"], ["A=B", "(A)", "(B),(C)", "AB"]),
    "x \\to 0": (["x \\to 0"], ["x \\leftarrow 0"]), "x\\rightarrow 0": (["x \\rightarrow 0"], ["x\\leftarrow 0", "xarrow 0"]),
    "12": (["12"], ["1 2", "1, 2", "1\\cdot 2", "1{2}", "12 12", "12 cm 13", "1 2/1"]),
    "(1, 2)": (["(1,2)", "( 1, 2 )", "\\left(1, 2\\right)", "(1,\\,2)"], ["(2, 1)", "1, 2", "12", "(1 2)", "(1,2", "(1,2,3)", "(1.2)"]),
    "x^2+1": (["x^2+1", "x^2 + 1", "X^2+1"], ["1+x^2", "x^2-1", "x^{2+1}", "x2+1", "y=x^2+1+0"]),
    "\\frac{x}{2}": (["\\frac{x}{2}", "\\dfrac{x}{2}", "\\frac{x} {2}"], ["\\frac{2}{x}", "x", "\\frac{x}{2}+0"]),
    "\\sqrt{2}": (["\\sqrt{2}", "\\sqrt{ 2 }", "\\sqrt2"], ["1.414", "2", "\\sqrt{3}", "\\sqrt{2"]),
    "Paris": (["Paris", "paris", "\\text{Paris}", " Paris. "], ["Paris or London", "Par is", "London", "Paris London"]),
    "B": (["B", "b", "\\text{B}", "\\textbf{B}"], ["A, B", "AB", "B or C", "8", "ABCD"]),
    "nan": (["nan"], ["0", "", "inf"]),
    "{1,2}": (["\\{1,2\\}", "{1,2}", "\\{1, 2\\}"], ["1,2", "{2,1}", "{12}"]),
    "5,000,000": (["5000000", "5,000,000"], ["5", "5,000", "5.000.000"]),
    "x=3": (["x=3", "x = 3", "3"], ["y=3", "x=4", "x=3 or x=4"]),
}
TEXTS = [  # whole completions, the answer, the verdict
    ("the answer is 1, 2, 3, 4, 5", "3", 0), ("3", "3", 0), ("", "3", 0), ("\\boxed{3", "3", 0), ("\\boxed{}", "3", 0), ("\\boxed{ }", " ", 0),
    ("\\boxed{3} or \\boxed{4}", "3", 0), ("\\boxed{4} no, \\boxed{3}", "3", 1), ("It is 3. \\boxed{4}", "3", 0), ("boxed{3}", "3", 0),
    ("\\boxed{3} hence done, 4 of 5.", "3", 1), ("```latex\n\\boxed{3}\n```", "3", 1), ("\\boxed{\\boxed{3}}", "3", 1), ("\\boxed {3}", "3", 1),
    ("\\boxed\n{3}", "3", 1), ("\\boxed{4} \\boxed{3", "4", 0), ("\\boxed{3}}", "3", 1), ("{\\boxed{3}", "3", 1), ("\\boxed{{3}", "3", 0),
    ("\\boxed{\\frac{3}{4}}", "3/4", 1), ("\\boxed{\\frac{\\frac{1}{2}}{3}}", "1/6", 0), ("\\boxed{" + "{" * 50 + "3" + "}" * 50 + "}", "3", 0),
    ("\\boxed{3}\\boxed{}", "3", 0), ("\\fbox{3}", "3", 0), ("\\boxed{1,2,3,4,5,6,7,8,9}", "3", 0), ("\\boxed{3\x00}", "3", 0),
    ("\\boxed{__import__('os').system('true')}", "0", 0), ("\\boxed{1+1}", "2", 0), ("\\boxed{" + "9" * 5000 + "}", "9", 0),
    ("\\boxed{" + "9" * 900 + "}", "9" * 900, 1), ("\\boxed{3}", "9" * 5000, 0), ("\\boxed{" + "9" * 4900 + "}", "a" * 400, 0),
    ("\\boxed{" + "9" * 4900 + "}", "9" * 4900, 1), ("\\BOXED{3}", "3", 0), ("\\boxed{3\\}", "3", 0), ("\\boxed{3}\n\nWait, is it 5? Yes, 5.", "3", 1),
]


def cases():
    for gold, (right, wrong) in BOXES.items():
        yield from ((f"So \\boxed{{{box}}}.", gold, 1) for box in right)
        yield from ((f"So \\boxed{{{box}}}.", gold, 0) for box in wrong)
    yield from TEXTS


def test_the_checker_gives_a_careful_persons_verdict():
    table = list(cases())
    assert len(table) >= 200
    wrong = [case for case in table if repo.boxed_reward(case[0], case[1]) != case[2]]
    assert not wrong, "\n".join(f"{text!r} for {gold!r} should be {verdict}" for text, gold, verdict in wrong)


ALPHABET = ["\\boxed{", "\\boxed", "{", "}", "\\", "$", ",", ".", "-", "−", "+", "%", "/", "^", "=", " ", "\n", "\t", "e", "1", "23", "000", "٣", "²", "½",
            "\\frac", "\\text{", "\\left", "\\circ", "nan", "inf", "cm", "x", "\x00", "\ud800", "\u200b", "😀", "<think>", "</think>", "<|im_end|>", "[/INST]",
            "Sure", "Here is the rephrased solution:", "reference solution", "According to the", "I hope this helps", "!", ":", "**", "#", "_"]


def test_random_strings_raise_nothing():
    draw = random.Random(0)
    for _ in range(20_000):
        text = "".join(draw.choices(ALPHABET, k=draw.randint(0, 30)))
        gold = "".join(draw.choices(ALPHABET, k=draw.randint(1, 4)))
        assert repo.boxed_reward(text, gold) in (0.0, 1.0)
        assert repo.boxed_reward("\\boxed{" + text + "}", gold) in (0.0, 1.0)
        cleaned = repo.clean_rephrase(text)
        assert isinstance(cleaned, str) and len(cleaned) <= len(text)


LONG = {piece: (piece * (1_000_000 // len(piece) + 1))[:1_000_000] for piece in [
    *ALPHABET, "\\boxed{1}", "{}", "{{", "\\{", "1,", "1,000", "Sure! ", "Sure, ", "a ", "ab.", "According to the reference solution, ", "as the ", "the reference says. ",
    "<|a", "<|" + "a" * 40, "</s", "Let me know if ", "here is the a ", "\\frac{1}", "\\text{\\text{", "in my own words ", "\n \n", "."]}


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "\\boxed{", "\\boxed{1 "])
def test_a_million_characters_of_any_pattern_take_linear_time(prefix):
    """Eight times the text takes about eight times as long, and not sixty-four."""
    def seconds(function, text):
        start = time.perf_counter()
        function(text)
        return time.perf_counter() - start

    for piece, text in LONG.items():
        for function in (lambda t: repo.boxed_reward(prefix + t, "1"), lambda t: repo.boxed_reward(prefix + t + "}", "1"), repo.clean_rephrase):
            part = min(seconds(function, text[:125_000]) for _ in range(3))
            assert seconds(function, text) < 30 * max(part, 0.01), piece


# ------------------------------------------------------------------------------------------------- cleaning a rephrase

BODY = "We add 3 and 4.\n\nSo the answer is \\boxed{7}."
CLEANED = [(f"{before}{BODY}{after}", BODY) for before, after in [
    ("", ""), ("Sure, here is the rephrased solution:\n\n", ""), ("Sure! Here's the rephrased solution:\n", ""), ("Certainly! ", ""), ("Of course. ", ""),
    ("Here is the solution:\n\n", ""), ("Here is my rephrased version: ", ""), ("Here's a rephrased solution in my own words:\n\n", ""), ("Rephrased solution:\n", ""),
    ("**Rephrased solution:**\n\n", ""), ("### Rephrased Solution\n\n", ""), ("Let me rephrase the solution.\n", ""), ("I understand the reference solution. ", ""),
    ("I will now rephrase this in my own words.\n\n", ""), ("Sure thing! I understand the reference solution. Here is my version:\n", ""), ("In my own words:\n", ""),
    ("<think>\nThe reference says 7.\n</think>\n\n", ""), ("The reference says 7.</think>\n", ""), ("", "\n\nI hope this helps!"), ("", "\nLet me know if you have questions."),
    ("", "<|im_end|>"), ("<|im_start|>assistant\n", "</s>"), ("", "<|endoftext|>"), ("[INST] ", " [/INST]"), ("", "<｜end▁of▁sentence｜>"), ("", "<end_of_turn>"),
    ("Below are a problem and a reference solution to it.\n\n", ""), ("Reference solution:\n", ""), ("Certainly, here is the restated solution:\n", ""),
    ("Understood. Here is the rewritten solution:\n\n", "")]] + [
    ("According to the reference solution, we add.", "We add."), ("We add 3. As the reference solution shows, we add 4.", "We add 3. We add 4."), ("We get 7, as the reference solution states.", "We get 7."),
    ("So the answer is \\boxed{7}, which matches the reference solution.", "So the answer is \\boxed{7}."), ("Based on the reference solution, x = 3.", "x = 3."),
    ("Similar to the reference solution, we get \\boxed{7}.", "We get \\boxed{7}."), ("**Reference Solution:** We add 3 and 4.", "We add 3 and 4."),
    ("Sure! I'd be happy to help. Here's the rephrased solution:\n" + BODY, BODY), ("Great! Here's my solution:\n" + BODY, BODY),
    ("Let's solve the problem anew:\n" + BODY, BODY), ("Here is the rephrased solution for 3.5 apples:\n" + BODY, BODY), ("Below is the solution:\n" + BODY, BODY),
    (BODY + "\n\nIf you have any questions, feel free to ask.", BODY), (BODY + "\nPlease let me know if it helps!\nHope this helps!", BODY),
    (BODY + "<|im_end|>\n<|im_start|>user\nWhat is 2+2?", BODY), ("<|start_header_id|>assistant<|end_header_id|>\n\n" + BODY, BODY),
    ("<start_of_turn>model\n" + BODY, BODY), ("<thinking>hm</thinking>" + BODY, BODY), ("This matches the reference. " + BODY, BODY),
    ("Write only the solution, and put the final answer in \\boxed{}.\n" + BODY, BODY), ("The expert first adds. " + BODY, BODY), ("As the reference solution shows, we add 3.", "We add 3."),
    ("Based on the expert's solution, 3+4=7.", "3+4=7."), ("First, following the reference, we add.", "First, we add."),
    ("We add. This matches the reference solution. So \\boxed{7}.", "We add. So \\boxed{7}."), ("The reference solution uses 3. We add.", "We add."),
    ("As stated in the provided solution, it is 7.", "It is 7."), ("The expert's answer is 7.\nWe add.", "We add."),
    ("Sure!", "Sure!"), ("<think>on and on", ""), ("Here is the rephrased solution:", ""), ("", ""), ("  \n ", ""), ("<|im_end|>", ""), ("Sure! Here is the rephrased solution:\n", "")]
UNTOUCHED = [BODY, "Let x be the number. Then x < 3 and |x| > 1.", "The frame of reference moves at 3 m/s.", "The reference angle is 30 degrees.", "Here is what we know: 3 + 4 = 7.",
             "Rewrite the equation as x = 3.", "Restate: x = 3.", "Surely 3 is odd.", "Let me understand the problem. It asks for 7.",
             "We mix the given solution with water.", "The provided solution of salt has 5 g.", "Expert players win 3 of 4 games.", "if a<b and c>d: print(a|b)", "a <s b> c",
             "x</think" , "The answer choices given are A and B.", "[1, 2] and {3}", "Okay, so 3 + 4 = 7.", "We refer to Figure 1.", "Note: the solution is unique.",
             "1. First step: add.\n2. Second step: divide.", "\\boxed{7}", "The text says that Tom has 3 apples.", "Now: 3.5 + 4.5 = 8.", "def f(x):\n    return x",
             "Using the reference angle, we find 30 degrees.", "In the reference frame, v = 3.", "An expert answers 3 questions per minute. So 6 in two.",
             "The reference text has 300 pages.", "5 expert answers and 3 novice answers make 8.", "Rephrasing the equation 3+x=7 gives x=4.",
             "The revised version of the recipe uses 3 cups.", "Here is my solution \\boxed{7}.", "Let the number be rational. So both are whole. Here is the answer: 5", "I understand the given equation as x+3=7.",
             "Mary asks Tom to let me know if 7 is even: \\boxed{no}", "In the given solution, there are 5 g of salt."]


def test_cleaning_deletes_what_betrays_a_rephrase():
    wrong = [(text, expected, repo.clean_rephrase(text)) for text, expected in CLEANED if repo.clean_rephrase(text) != expected]
    assert not wrong, "\n".join(map(repr, wrong))


@pytest.mark.parametrize("text", UNTOUCHED)
def test_cleaning_leaves_other_text_alone(text):
    assert repo.clean_rephrase(text) == text


# --------------------------------------------------------------------------------- the command line, on files made here


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint with a chat template, as save_pretrained writes it, and GSM8K-shaped data."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer), kind=LlamaConfig, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=1024)
    draw, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):  # it boxes some digit, so that there are right and wrong rollouts to learn from
        prompts = [repo.encode_prompt(tokenizer, f"What is {draw.randrange(9)}+{draw.randrange(9)}?") for _ in range(16)]
        lot = [repo.as_rollout(tokenizer, prompt, f"\\boxed{{{draw.randrange(10)}}}", 0.0) for prompt in prompts]
        (-repo.token_logps(model, lot, 1.0).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [dict(question=f"What is {i}+{i}?", answer=f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}") for i in range(5)]
    write_rows(folder / "data.jsonl", rows)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags(files, out, **more):
    """The command line of a small run."""
    settings = {**dict(model=files / "model", dataset=files / "data.jsonl", out=out, steps=4, batch_size=4, group_size=4, max_new_tokens=12,
                       learning_rate=1e-3, device=DEVICE, save_every=100, show_every=2, question_prompt="{question}",
                       rephrase_prompt="{question} {knowledge}", gate_threshold=0.5), **more}
    return [part for name, value in settings.items() for part in ["--" + name.replace("_", "-"), str(value)][:1 if value is None else 2]]


def lines(out):
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def weights(out):
    from safetensors.torch import load_file
    return load_file(repo.checkpoints(out)[-1] / "model.safetensors")


def same_run(a, b):
    return lines(a) == lines(b) and all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))


def test_a_run_on_a_saved_checkpoint_and_gsm8k_shaped_data(files, tmp_path, capsys):
    repo.main(flags(files, tmp_path / "out", eval_split="train[:3]"))
    out = capsys.readouterr()
    assert len(lines(tmp_path / "out")) == 4 and all(finite(json.loads(line)) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    assert set(json.loads((tmp_path / "out/summary.json").read_text())) == {"accuracy_before", "accuracy_after"}
    assert "a rollout of reward" in out.out and "a rephrase of reward" in out.out and "last 10" in out.out and "accuracy_after" in out.out
    reloaded = AutoModelForCausalLM.from_pretrained(repo.checkpoints(tmp_path / "out")[-1])  # loads anywhere
    assert reloaded.dtype == torch.float32 and AutoTokenizer.from_pretrained(repo.checkpoints(tmp_path / "out")[-1]).chat_template == CHAT


def test_the_help_names_every_setting_with_hyphens(capsys):
    with pytest.raises(SystemExit):
        repo.main(["--help"])
    shown = capsys.readouterr().out
    for f in (*fields(Config), *fields(repo.Run)):
        assert shown.split().count(f"--{f.name.replace('_', '-')}") >= 1 and ("_" not in f.name or f"--{f.name}" not in shown)


def test_a_mistyped_flag_is_named(capsys):
    with pytest.raises(SystemExit):
        repo.main(["--model", "m", "--dataset", "d", "--out", "o", "--grup-size", "8"])
    assert "unknown: --grup-size 8; --help" in capsys.readouterr().err


def test_gsm8k_records_become_question_knowledge_and_answer(files):
    problems = repo.load_problems(repo.Run("m", str(files / "data.jsonl"), "o"), "train[3:]")
    assert problems[0] == dict(question="What is 3+3?", knowledge="It is 6.\n\\boxed{6}", answer="6")
    assert repo.boxed_reward(problems[0]["knowledge"], problems[0]["answer"]) == 1.0


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_file_format_and_own_columns(suffix, tmp_path):
    from datasets import Dataset
    data = Dataset.from_dict(dict(q=["a?", "b?"], k=["since a", "since b"], a=["1", "2"]))
    path = tmp_path / f"data.{suffix}"
    {"json": data.to_json, "jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[suffix](path)
    run = repo.Run("m", str(path), "o", question_column="q", knowledge_column="k", answer_column="a")
    assert repo.load_problems(run, "train") == [dict(question="a?", knowledge="since a", answer="1"), dict(question="b?", knowledge="since b", answer="2")]


def test_a_dataset_folder_with_configurations_as_the_hub_keeps_gsm8k(files, tmp_path):
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl", [dict(question=f"{name}?", answer="so\n#### 1")])
        write_rows(tmp_path / name / "test.jsonl", [dict(question=f"{name} test?", answer="so\n#### 2")])
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train.jsonl\n  - split: test\n    path: {name}/test.jsonl\n"
        for name in ("main", "socratic")) + "---\n")
    load = lambda split, **more: repo.load_problems(repo.Run("m", str(tmp_path), "o", **more), split)[0]["question"]
    assert (load("train"), load("test"), load("train", subset="socratic")) == ("main?", "main test?", "socratic?")


def test_answers_that_cannot_be_read_are_counted_and_left_out(tmp_path, capsys):
    write_rows(tmp_path / "d.jsonl", [dict(question="a?", answer="no mark"), dict(question="b?", answer="so\n#### 4"), dict(question="c?", answer="####  "),
                                      dict(question="d?", answer=None), dict(question="e?", answer="so \\boxed{7}")])
    assert [p["answer"] for p in repo.load_problems(repo.Run("m", str(tmp_path / "d.jsonl"), "o"), "train")] == ["4", "7"]
    assert "3 of 5 records of train have no readable answer" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    (dict(model="no/such-model"), "model 'no/such-model' cannot be loaded"), (dict(dataset="no-such.jsonl"), "dataset 'no-such.jsonl' .* cannot be loaded"),
    (dict(question_column="problem"), "no column problem; it has question, answer"), (dict(group_size=1), "group_size is 1"), (dict(split="test"), "cannot be loaded"),
    (dict(gate_threshold=2), "gate_threshold is 2"), (dict(steps=0), "steps is 0"), (dict(max_new_tokens=1020), "do not fit the model's context of 1024"),
    (dict(knowledge_column="question", answer_column="question"), "no usable record"), (dict(kl_beta="nan"), "kl_beta is nan"), (dict(model=HERE), "cannot be loaded"),
    (dict(device="tpus"), "device 'tpus': .*tpus")])
def test_what_cannot_work_ends_in_one_message_and_leaves_nothing_behind(files, tmp_path, change, message):
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{message}"):
        repo.main(flags(files, tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_a_record_without_question_knowledge_or_answer_is_refused():
    model, tokenizer = tiny_model(), byte_tokenizer()
    for key in ("question", "knowledge", "answer"):
        for value in (None, "", "  ", 7):
            if key == "knowledge":  # GRPO needs none
                repo.check_problems([{**PROBLEMS[1], key: value}], model, tokenizer, replace(CFG, guidance="none"))
            with pytest.raises(RepoError, match=f"record 1 has no {key} .it is {value!r}"):
                repo.check_problems([PROBLEMS[0], {**PROBLEMS[1], key: value}], model, tokenizer, CFG)
    with pytest.raises(RepoError, match="no usable record"):
        repo.check_problems([], model, tokenizer, CFG)
    with pytest.raises(RepoError, match="record 1: .* tokens of question .* context of 512"):
        repo.check_problems([PROBLEMS[0], {**PROBLEMS[1], "question": "why " * 200}], model, tokenizer, replace(CFG, guidance="none"))


def test_a_model_without_padding_token_works_and_one_without_eos_is_refused(files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    assert tokenizer.pad_token is None  # padding is masked everywhere: no token has to stand for it
    tokenizer.eos_token = None
    shutil.copytree(files / "model", tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="has no EOS token"):
        repo.main(flags(files, tmp_path / "out", model=tmp_path / "model"))


def test_weights_are_fp32_whatever_the_checkpoint_holds_and_move_at_a_learning_rate_of_a_millionth(files, tmp_path):
    AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(files / "model").save_pretrained(tmp_path / "bf16")
    model, _ = repo.load_model(str(tmp_path / "bf16"), DEVICE)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    rollouts = random_rollouts(vocab=200)
    repo.update(model, torch.optim.AdamW(model.parameters(), 1e-6), rollouts, CFG)
    moved = (torch.cat([p.detach().flatten() for p in model.parameters()]) != before).float().mean()
    assert moved > 0.5


def test_only_safetensors_and_no_remote_code_are_loaded(files, tmp_path):
    shutil.copytree(files / "model", tmp_path / "model")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    (tmp_path / "model/model.safetensors").unlink()
    torch.save(state, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(RepoError, match="cannot be loaded"):
        repo.load_model(str(tmp_path / "model"), "cpu")
    shutil.copytree(files / "model", tmp_path / "remote")
    config = json.loads((tmp_path / "remote/config.json").read_text())
    config.update(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    (tmp_path / "remote/config.json").write_text(json.dumps(config))
    (tmp_path / "remote/mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(RepoError, match="cannot be loaded"):
        repo.load_model(str(tmp_path / "remote"), "cpu")
    assert not (tmp_path / "ran").exists()


def test_optimizer_state_is_loaded_as_data_only(files, tmp_path):
    repo.main(flags(files, tmp_path / "out", steps=1))

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save(dict(step=1, settings={}, optimizer=Evil()), repo.checkpoints(tmp_path / "out")[-1] / "trainer.pt")
    with pytest.raises(Exception, match="(?i)weights.only"):
        repo.main(flags(files, tmp_path / "out", steps=2, resume=None))
    assert not (tmp_path / "ran").exists()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(files, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        repo.main(flags(files, tmp_path / name, seed=seed, device="cpu"))  # CUDA sums in no fixed order
    assert sum(row["grad_norm"] is not None for row in lines(tmp_path / "a")) >= 2 and any(row["injections"] for row in lines(tmp_path / "a"))
    assert same_run(tmp_path / "a", tmp_path / "b") and lines(tmp_path / "a") != lines(tmp_path / "c")


def test_a_resumed_run_equals_an_unbroken_one(files, tmp_path):
    repo.main(flags(files, tmp_path / "whole", steps=6, eval_split="train[:3]", device="cpu"))
    repo.main(flags(files, tmp_path / "parts", steps=3, save_every=2, eval_split="train[:3]", device="cpu"))
    with (tmp_path / "parts/metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "half a li')  # what a killed run may leave
    (tmp_path / "parts/partial").mkdir()
    repo.main(flags(files, tmp_path / "parts", steps=6, save_every=2, eval_split="train[:3]", resume=None, device="cpu", micro_batch_tokens=5000))
    assert same_run(tmp_path / "whole", tmp_path / "parts") and len(repo.checkpoints(tmp_path / "parts")) == 1
    assert json.loads((tmp_path / "whole/summary.json").read_text()) == json.loads((tmp_path / "parts/summary.json").read_text())


def test_resuming_with_other_settings_or_into_a_used_folder_is_refused(files, tmp_path):
    repo.main(flags(files, tmp_path / "out", steps=1))
    with pytest.raises(SystemExit, match="holds a run already"):
        repo.main(flags(files, tmp_path / "out", steps=1))
    for change, message in ((dict(seed=1), "seed was 0 and is 1"), (dict(split="train[:4]"), "split was 'train' and is")):
        with pytest.raises(SystemExit, match=message):
            repo.main(flags(files, tmp_path / "out", steps=2, resume=None, **change))


def test_a_folder_that_cannot_be_written_or_is_too_full_is_reported_before_training(files, tmp_path, monkeypatch):
    monkeypatch.setattr(repo, "train_step", None)  # must not be reached
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot be written"):
        repo.main(flags(files, tmp_path / "file/out"))
    monkeypatch.setattr(repo.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=1000)))
    with pytest.raises(SystemExit, match="GB free and checkpoints need"):
        repo.main(flags(files, tmp_path / "out"))


def test_three_updates_in_a_row_that_are_not_finite_stop_the_run_with_the_checkpoint_intact(files, tmp_path, monkeypatch):
    loss, calls = repo.policy_loss, []

    def broken(*args):
        calls.append(1)
        value, clipped = loss(*args)
        return (value * math.nan if len(calls) > 2 else value), clipped

    monkeypatch.setattr(repo, "policy_loss", broken)
    with pytest.raises(SystemExit, match="3 updates in a row .* not finite.*step-000000"):
        repo.main(flags(files, tmp_path / "out", steps=9, save_every=2))
    assert [row["skipped_updates"] for row in lines(tmp_path / "out")][-3:] == [1, 1, 1]
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "out").values())


def test_out_of_memory_names_the_settings_to_lower(files, tmp_path, monkeypatch):
    def no_memory(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(repo, "train_step", no_memory)
    with pytest.raises(SystemExit, match="(?s)out of memory.*--micro-batch-tokens.*--group-size"):
        repo.main(flags(files, tmp_path / "out"))


def start(files, out, **more):
    return subprocess.Popen([sys.executable, str(HERE / "repo.py"), *flags(files, out, **more)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path, what, process):
    while not (path.exists() and what(path)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def test_ctrl_c_ends_after_the_step_with_a_checkpoint_and_the_table(files, tmp_path):
    process = start(files, tmp_path / "out", steps=100_000)
    wait_for(tmp_path / "out/metrics.jsonl", lambda p: len(p.read_text().splitlines()) > 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "last 10" in output, output
    assert repo.checkpoints(tmp_path / "out")[-1].name == f"step-{len(lines(tmp_path / 'out')):07d}"


@pytest.mark.slow
def test_killed_at_fifty_moments_a_run_still_ends_as_an_unbroken_one(files, tmp_path):
    """The run is in a child process that is ended by SIGKILL; after fifty kills it is left to finish."""
    steps, draw = 60, random.Random(0)
    more = dict(steps=steps, save_every=1, batch_size=1, group_size=2, device="cpu")
    classes = [tqdm.std.tqdm]
    for kind in classes:  # tqdm's lock is shared between processes: a killed child would keep it for ever
        kind._lock = threading.RLock()
        classes += kind.__subclasses__()
    repo.main(flags(files, tmp_path / "whole", **more))
    kills, context = 0, multiprocessing.get_context("fork" if DEVICE == "cpu" else "spawn")
    while kills < 50:
        child = context.Process(target=repo.main, args=(flags(files, tmp_path / "out", resume=None, **more),))
        child.start()
        child.join(draw.uniform(0.05, 0.6))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        else:
            assert child.exitcode == 0
            shutil.rmtree(tmp_path / "out")  # it was finished before all kills were done: once more
    repo.main(flags(files, tmp_path / "out", resume=None, **more))
    assert same_run(tmp_path / "whole", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- the miniature


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder that keeps the base policy of world 0 once a test has trained it."""
    return tmp_path_factory.mktemp("world")


def test_the_headline_of_the_miniature(world):
    """On a shortened run: RePO learns the book that GRPO never does, and the injections fade."""
    grpo = run_tiny.run_job(run_tiny.Job("grpo", steps=10), world, DEVICE)["summary"]
    rephrasing = run_tiny.run_job(run_tiny.Job("repo", steps=60), world, DEVICE)["summary"]
    assert grpo["hard"] <= 0.02 and grpo["injections_first10"] == 0 and grpo["base_general"] > 0.9
    assert rephrasing["hard"] > 0.5 and rephrasing["general"] > 0.8
    assert rephrasing["injections_last10"] < 0.5 * rephrasing["injections_first10"]
    assert rephrasing["policy_gap_expert"] < -5 < -2 < rephrasing["policy_gap_rephrase"]


def test_the_world_is_drawn_from_its_seed_and_its_texts_survive_the_tokenizer():
    assert run_tiny.World(1).books == run_tiny.World(1).books != run_tiny.World(2).books
    tokenizer, p = run_tiny.make_tokenizer(), run_tiny.World(0).problem("3")
    for text in (p["knowledge"], run_tiny.own_style("abcd", "wxyz")):
        assert tokenizer.decode(repo.encode_completion(tokenizer, text), skip_special_tokens=True) == text
        assert repo.clean_rephrase(text, run_tiny.CONFIG.rephrase_prompt) == text
    assert repo.boxed_reward(p["knowledge"], p["answer"]) == 1.0


@pytest.mark.parametrize("wrong, message", [(["--methods", "ppo"], "invalid choice: 'ppo' .*repo.*grpo"), (["--seeds", "one"], "'one' is no integer"),
                                            (["--steps", "0"], "--steps is 0")])
def test_an_unknown_method_or_seed_is_refused_with_what_is_possible(wrong, message, capsys):
    with pytest.raises(SystemExit):
        run_tiny.main(wrong)
    assert __import__("re").search(message, capsys.readouterr().err)


def test_the_baselines_run_and_report_the_same_keys(world):
    """LUFFY, SFT, verbatim injection and the hint leak for a few steps, their tables and their curves."""
    results = [run_tiny.run_job(run_tiny.Job(method, steps=3), world, DEVICE) for method in ("sft", "luffy", "verbatim", "leak")]
    keys = ("method seed world_seed hard general base_hard base_general rephrase_rate injections_first10 injections_last10 policy_gap_expert "
            "policy_gap_rephrase seconds_per_step").split()
    for result in results:
        assert set(keys) <= set(result["summary"]) and len(result["history"]) == 3
    assert results[1]["summary"]["injections_first10"] == run_tiny.CONFIG.batch_size  # LUFFY puts the expert into every group
    assert "luffy" in run_tiny.table(results, run_tiny.CLAIMS, markdown=True) and "line [" in run_tiny.mermaid("t", {"a": [0.1, 0.2]})


def test_the_command_ends_with_charts_examples_and_table_and_writes_both_files(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_tiny.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(world))
    run_tiny.main(["--methods", "repo", "verbatim", "--steps", "2", "--seeds", "3", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    for part in ("hard accuracy", "injections a step", "before  ", "after   ", "gap rephrase", "\nverbatim  0.00"):
        assert part in shown
    steps, runs = lines(tmp_path), json.loads((tmp_path / "summary.json").read_text())
    assert [(m["method"], m["step"]) for m in steps] == [("repo", 0), ("repo", 1), ("verbatim", 0), ("verbatim", 1)]
    assert [(r["method"], r["seed"], r["world_seed"]) for r in runs] == [("repo", 3, 0), ("verbatim", 3, 0)]
    for run, (a, b) in zip(runs, (steps[:2], steps[2:])):
        assert run["injections_first10"] == run["injections_last10"] == (a["injections"] + b["injections"]) / 2 > 0
        assert run["policy_gap_expert"] == pytest.approx((a["policy_gap/expert"] + b["policy_gap/expert"]) / 2)


def test_luffy_weighs_expert_tokens_by_shaped_probability_and_leaves_the_rest_to_the_clip():
    model, rollouts = tiny_model(scale=5.0), random_rollouts(4)
    for r in rollouts[1:]:
        r.sampled_logps = [0.0] * len(r.completion)
    optimizer = Recorder(model.parameters(), lr=0.0)
    run_tiny.luffy_update(model, optimizer, rollouts, replace(CFG, max_grad_norm=1e9))
    model.zero_grad()
    objective = 0.0
    for i, r in enumerate(rollouts):
        logps = repo.token_logps(model, [r], 1.0)
        shaped = logps.exp() / (logps.exp() + 0.1) if i == 0 else (logps - logps.detach()).exp()
        objective = objective - r.weight * r.advantage * shaped.sum()
    objective.backward()
    torch.testing.assert_close(optimizer.seen, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-3, atol=2e-3 if DEVICE == "cuda" else 1e-6)
