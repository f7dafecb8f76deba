"""Every place where code of this family goes wrong, pinned. `pytest` runs the fast tests, `pytest -m "slow or not slow"` all."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
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


def tiny_model(vocab=300, seed=0, scale=1.0, **settings):
    """A random Qwen2 of two layers. `scale` sharpens its distribution."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
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
    for r, r.weight in zip(rollouts, repo.token_weights([len(r.completion) for r in rollouts], aggregation)):
        pass


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
        assert len(f.metadata["help"]) > 20
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
        assert not specials & set(repo.encode_completion(tokenizer, text, finished=False))


def test_a_rephrase_is_tokenised_as_an_assistants_turn():
    tokenizer = byte_tokenizer(bos=True)
    ids = repo.encode_completion(tokenizer, "So 2.")
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.bos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "So 2."
    assert repo.encode_completion(tokenizer, "So 2.", finished=False) == ids[:-1]  # a truncated one has no EOS


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
    rewards = np.random.default_rng(0).random((5, 8))
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(repo.group_advantages(torch.tensor(rewards)).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -7.3, 1e9])
def test_a_group_of_equal_rewards_has_exactly_no_advantage(reward):
    assert (repo.group_advantages(torch.full((2, 7), reward)) == 0).all()


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
    assert seen[0].shape[1] == 7  # 46 positions, of which 40 prompt tokens are not needed, one more for the first
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
    model.activation_checkpointing_enable()
    torch.testing.assert_close(gradient(model, rollouts, replace(cfg, gradient_checkpointing=True)), plain, rtol=1e-3, atol=1e-5)
    assert not model.training and len(repo.sample(model, [[1]], 2, 3, 1.0, [])) == 2


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
