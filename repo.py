r"""RePO: Rephrasing Policy Optimization (arXiv 2602.10819), a reference implementation in one file.

A language model is the policy π. For a question q there is an expert's solution k (the knowledge)
and a checkable answer. One training step:

    1. Rollout     o_1..o_G ~ π_old(·|q), each with a reward          rollout, complete, sample
    2. Rephrase    o_rep ~ π_old(·|P(q,k)): understand the expert's   rephrase, clean_rephrase
                   solution and write it anew in one's own words
    3. Injection   if the share of failed rollouts is at least ρ,     gate_opens, replace_worst
                   o_rep takes the place of the worst rollout,
                   provided that its own reward is higher
    4. Update      group-relative advantages, clipped policy          group_advantages, token_logps,
                   gradient; o_rep is scored under the plain q        policy_loss, update

`train_step` is the whole algorithm. There the paper ends; a reward for mathematics and the command
line follow:

    python repo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k --subset main --out out

(paper) and (ours) say whose a choice is. No code of the authors is public: "paper" means what
independent readers of its full text report.
"""

import json
import math
import numbers
import os
import random
import re
import sys
import time
from dataclasses import MISSING, asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser


class RepoError(ValueError):
    """Something given cannot work; the message names it and says what to do."""


# ------------------------------------------------------------------------------------- settings

QUESTION_PROMPT = "{question}\n\nReason step by step and put the final answer in \\boxed{}."

REPHRASE_PROMPT = """Below are a problem and a reference solution to it.

Problem:
{question}

Reference solution:
{knowledge}

First understand why the reference solution is right. Then solve the problem anew in your own \
words and your usual style, as if you had found the solution yourself. Never mention the \
reference. Write only the solution, and put the final answer in \\boxed{}."""


def setting(default, doc: str):
    """A dataclass field whose documentation is also the help of its command-line flag."""
    return field(default=default, metadata={"help": doc})


@dataclass(frozen=True)
class Config:
    """The settings of the algorithm. Each is a command-line flag too."""

    group_size: int = setting(8, "G, rollouts of each question (paper)")
    batch_size: int = setting(16, "questions per step (ours, for one GPU; the paper has 512)")
    max_new_tokens: int = setting(512, "longest completion, in tokens (ours)")
    temperature: float = setting(1.0, "T: the policy is softmax(logits / T) (ours)")
    guidance: Literal["rephrase", "verbatim", "none"] = setting(
        "rephrase",
        "what an open gate lets in: rephrase (paper); for comparison (ours) verbatim, the expert's "
        "own text, or none, which is plain GRPO",
    )
    fail_threshold: float = setting(0.5, "delta: a rollout with a lower reward has failed (ours)")
    gate_threshold: float = setting(
        1.0, "rho: the gate opens when at least this share of the group failed (ours)"
    )
    clip_epsilon: float = setting(0.2, "epsilon: the ratio is clipped to 1 ± epsilon (ours)")
    kl_beta: float = setting(0.0, "beta, the weight of the KL term; 0 needs no reference (ours)")
    updates_per_batch: int = setting(1, "optimizer steps on each batch of rollouts (ours)")
    learning_rate: float = setting(1e-6, "1e-6 (paper); constant, AdamW, no weight decay (ours)")
    max_grad_norm: float = setting(1.0, "a longer gradient is scaled down to this norm (ours)")
    micro_batch_tokens: int = setting(
        8192,
        "tokens, padding included, in one pass of the update; changes speed and memory, not the "
        "gradient; memory peaks at about 16 bytes x vocabulary per token (ours)",
    )
    question_prompt: str = setting(QUESTION_PROMPT, "the plain question q as a user's turn (ours)")
    rephrase_prompt: str = setting(REPHRASE_PROMPT, "P(q,k) as a user's turn (ours)")
    seed: int = setting(0, "of the sampling and of the order of the questions (ours)")

    def __post_init__(self):
        """Errors: RepoError for values with which nothing could be learnt."""
        smallest = dict(group_size=2, batch_size=1, max_new_tokens=1, updates_per_batch=1)
        for name, minimum in smallest.items():  # a group of one has nothing to compare
            if getattr(self, name) < minimum:
                raise RepoError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        if not self.temperature > 0:
            raise RepoError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.gate_threshold <= 1:
            raise RepoError(f"gate_threshold is {self.gate_threshold}; it must be a share of the "
                            "group, 0 to 1")
        if not 0 < self.fail_threshold <= 1:
            raise RepoError(f"fail_threshold is {self.fail_threshold}; it must be above 0 and at "
                            "most 1, to tell a reward of 0 from a reward of 1")


@dataclass
class Rollout:
    """One completion of a question, with all that moves along when it is replaced."""

    prompt: list[int]  # token ids that the completion follows: of q in all that is trained
    completion: list[int]  # token ids, with the end token, which is trained too
    text: str  # the completion as the reward reads it
    truncated: bool = False  # sampled, and max_new_tokens came before an end token
    sampler_logps: list[float] | None = None  # log π_old per token; None for text from elsewhere
    reward: float = 0.0


# ------------------------------------------------------------------------------------ 1. rollout


def fill(template: str, problem: dict) -> str:
    """The template with {question} and {knowledge} filled in; other braces stay as they are."""
    return re.sub(r"\{(question|knowledge)\}", lambda slot: problem[slot[1]], template)


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Token ids of the user's turn `text`, up to where the assistant's answer begins.

    Control tokens that the text spells out stay text (`sanitize_control_tokens`). A thinking model
    is asked not to think (ours): o_rep has no thoughts, and would teach it to leave them out.
    Errors: RepoError if the chat template opens a block of thoughts all the same.
    """
    if not tokenizer.chat_template:  # a base model; after a line break no token begins with a blank
        ids = tokenizer(text + "\n\nSolution:\n", split_special_tokens=True).input_ids
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers append EOS
    chat = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False,
                                        sanitize_control_tokens=True).input_ids
    if re.search(r"<[^<>/]*(think|reason)[^<>/]*>\s*$", tokenizer.decode(ids[-16:])):
        raise RepoError("the chat template opens a block of thoughts even with enable_thinking="
                        "False, and a rephrase has none; use a model that can answer without")
    return ids


def end_tokens(model, tokenizer) -> list[int]:
    """The ids that end a completion; the first is what the chat template writes after an answer.

    That is `<end_of_turn>` for Gemma and `<|end|>` for Phi, where the tokenizer's EOS is another.
    To find it, an answer of 42 is put through the template.
    """
    ends = []
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "42"}]
        after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("42")[2]
        after = tokenizer(after, add_special_tokens=False).input_ids
        ends = [i for i in after if i in tokenizer.added_tokens_decoder][:1]
    configured = model.generation_config.eos_token_id  # an id, several or None
    ends += [tokenizer.eos_token_id]
    ends += configured if isinstance(configured, list) else [configured]
    return [i for i in ends if i is not None]


def pad(rows, side, device):
    """Lists of unequal lengths as one tensor [B, longest], filled up with 0 on the side given."""
    tensors = [torch.tensor(row, device=device) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_side=side)


def autocast(model):
    """On CUDA bf16 matrix products, and so bf16 logits, over fp32 weights; elsewhere fp32.

    In bf16 weights a step of 1e-6 would vanish. The softmax is always taken in fp32.
    """
    device = model.device.type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


@torch.no_grad()
def sample(model, prompts, num_samples, max_new_tokens, temperature, ends):
    """Draws `num_samples` completions of each prompt from exactly softmax(logits / T).

    `prompts` are lists of token ids; T = 0 is greedy. Returns (token ids, log-probability of each)
    for each completion, those of a prompt side by side. A completion ends with its first token in
    `ends`, or after `max_new_tokens` without one.

    A loop of our own: `model.generate` follows the checkpoint's top-k, top-p and penalties, and
    takes longer. Here a prompt is read once for all its samples, and finished rows leave.
    """
    inputs = pad(prompts, "left", model.device)  # [B, P]
    mask = pad([[1] * len(prompt) for prompt in prompts], "left", model.device)  # [B, P]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # of the real tokens: 0, 1, 2, ...
    cache = None
    completions = [([], []) for _ in range(len(prompts) * num_samples)]  # token ids, log π
    rows = completions  # those that are still being written

    with autocast(model):
        for t in range(max_new_tokens):
            output = model(inputs, attention_mask=mask, position_ids=positions, cache=cache,
                           use_cache=True, logits_to_keep=1)
            logits = output.logits[:, -1].float()  # [B, V] at first, then [rows, V]
            cache = output.get("cache")  # past_key_values before transformers 5.24
            if not hasattr(cache, "reorder_cache"):
                raise RepoError(f"{type(model).__name__} keeps no cache whose rows can be "
                                "rearranged; use another model")
            if t == 0:  # each prompt has been read once; now one copy of it for each sample
                copies = torch.arange(len(prompts), device=model.device)
                copies = copies.repeat_interleave(num_samples)  # 0 0 0 1 1 1 ...
                cache.reorder_cache(copies)
                logits, mask = logits[copies], mask[copies]

            policy = (logits / (temperature or 1.0)).log_softmax(-1)  # [rows, V]
            drawn = policy.exp().multinomial(1) if temperature else policy.argmax(-1, keepdim=True)
            drawn_logp = policy.gather(1, drawn)  # [rows, 1]
            for (ids, logps), [token], [logp] in zip(rows, drawn.tolist(), drawn_logp.tolist()):
                ids.append(token)
                logps.append(logp)

            unfinished = [n for n, (ids, _) in enumerate(rows) if ids[-1] not in ends]
            if not unfinished:
                break
            if len(unfinished) < len(rows):
                rows = [rows[n] for n in unfinished]
                kept = torch.tensor(unfinished, device=model.device)
                cache.reorder_cache(kept)
                drawn, mask = drawn[kept], mask[kept]
            inputs = drawn
            positions = mask.sum(1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(drawn)], dim=1)
    return completions


def complete(model, tokenizer, turns, num_samples, temperature, cfg) -> list[list[Rollout]]:
    """`num_samples` answers to each user's turn, a list for each turn, not yet rewarded."""
    prompts = [encode_prompt(tokenizer, turn) for turn in turns]
    ends = end_tokens(model, tokenizer)
    drawn = sample(model, prompts, num_samples, cfg.max_new_tokens, temperature, ends)
    groups = [[] for _ in prompts]
    for i, (ids, logps) in enumerate(drawn):
        n = i // num_samples
        text = tokenizer.decode(ids, skip_special_tokens=True)
        truncated = ids[-1] not in ends
        groups[n].append(Rollout(prompts[n], ids, text, truncated, sampler_logps=logps))
    return groups


def checked_reward(reward_fn, text: str, problem: dict) -> float:
    """reward_fn(text, answer). Errors: RepoError with question and text if it is not finite."""
    reward = reward_fn(text, problem["answer"])
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        raise RepoError(f"the reward function must return a finite number and returned {reward!r}\n"
                        f"question: {problem['question']}\ncompletion: {text}")
    return float(reward)


def rollout(model, tokenizer, problems, num_samples, temperature, cfg, reward_fn):
    """Step 1: o_1..o_G ~ π_old(·|q) with their rewards: a list of Rollouts for each problem."""
    questions = [fill(cfg.question_prompt, problem) for problem in problems]
    groups = complete(model, tokenizer, questions, num_samples, temperature, cfg)
    for group, problem in zip(groups, problems):
        for r in group:
            r.reward = checked_reward(reward_fn, r.text, problem)
    return groups


# ----------------------------------------------------------------------------------- 2. rephrase

THOUGHTS = re.compile(r"^.*</think(?:ing)?>|<think(?:ing)?>.*$", re.S)
CONTROL_TOKEN = re.compile(  # <|im_start|>assistant, </s>, <end_of_turn> ...
    r"(?:<[|｜][\w▁]{3,40}[|｜]>|</?s>|<(?:start|end)_of_turn>)(?:(?:assistant|model)(?=[<\n]))?"
)
META = re.compile(
    r"rephras|paraphras|(?:my|your) own words|\banew\b"
    r"|(?:reference|expert|(?:the|your) provided)(?:'s|’s)? (?:\w+ )?(?:solution|answer)\b"
    r"(?! choice)"
    r"|the reference\b(?! (?:angle|frame|point|line|level|group|value|triangle|number|circle)s?\b)"
    r"|^\W*(?:sure|certainly|of course|understood)[!.]"
    r"|here(?:'s|’s| is) (?:an?|the|my)(?: [\w-]+){0,2} solution\b(?! set)",
    re.I,
)


def clean_rephrase(text: str) -> str:
    """The text without what betrays that it is a rephrase, to read as a direct answer to q.

    Thoughts go. Where control tokens are spelled as text, the first part between them stays. Every
    sentence that speaks of the reference or of rephrasing goes, even if it holds the answer: then
    the reward says no. To delete such text is the paper's; the patterns, usual wordings, are ours.
    """
    text = THOUGHTS.sub("", text)
    parts = [part for part in CONTROL_TOKEN.split(text) if part.strip()]
    sentences = re.split(r"(?<=[.!?:])(?=\s)|(?<=:\*\*)|(?<=\n)", parts[0] if parts else "")
    return "".join(s for s in sentences if not META.search(s)).strip()


def as_rollout(tokenizer, problem, text, end, cfg) -> Rollout:
    """A text from elsewhere as a completion of the plain question, never of P(q,k) (Eq. 11).

    It is encoded as what follows a prompt: no BOS, nothing in it becomes a control token, and the
    ids in `end` close it. So the text is always encoded anew, even where cleaning changed nothing.
    """
    prompt = encode_prompt(tokenizer, fill(cfg.question_prompt, problem))
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return Rollout(prompt, ids + end, text)


def rephrase(model, tokenizer, problems, cfg) -> list[Rollout]:
    """Step 2: one o_rep ~ π_old(·|P(q,k)) per problem (Eq. 5), cleaned, as a completion of q.

    Drawn at the rollouts' temperature (ours). The draft's end token closes it; a truncated draft
    has none, and so its o_rep has none.
    """
    turns = [fill(cfg.rephrase_prompt, problem) for problem in problems]
    drafts = complete(model, tokenizer, turns, 1, cfg.temperature, cfg)
    rephrases = []
    for problem, (draft,) in zip(problems, drafts):
        text = clean_rephrase(draft.text)
        end = draft.completion[-1:]
        if draft.truncated and text:  # an empty text keeps it, as no completion may be empty
            end = []
        rephrases.append(as_rollout(tokenizer, problem, text, end, cfg))
    return rephrases


# ---------------------------------------------------------------------------------- 3. injection


def gate_opens(rewards, fail_threshold, gate_threshold) -> bool:
    """γ_fail ≥ ρ, where γ_fail is the share of a group's rewards below δ (paper)."""
    failed = sum(reward < fail_threshold for reward in rewards)
    return failed / len(rewards) >= gate_threshold


def replace_worst(group: list[Rollout], guide: Rollout) -> bool:
    """Puts the guide, o_rep, in the place of the group's lowest reward (paper); True if it did.

    The first among equals, and only if the guide's own reward is higher (both ours). With rewards
    of 0 and 1 and ρ = 1 the second rule changes nothing: a guide of 0 would join a group of zeros,
    which has no advantages. With graded rewards a worse guide would make the failures look good.
    """
    worst = min(range(len(group)), key=lambda i: group[i].reward)
    if guide.reward <= group[worst].reward:
        return False
    group[worst] = guide
    return True


# ------------------------------------------------------------------------------------- 4. update


def group_advantages(rewards):
    """A_i = (R_i - mean R) / (std R + 1e-6) in each group: [B, G] in fp64 -> [B, G] in fp32.

    The unbiased std and the 1e-6 are ours. Equal rewards give exactly 0, where otherwise a rounding
    error would be divided by 1e-6.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = centred / (rewards.std(dim=1, keepdim=True) + 1e-6)
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(all_equal, 0.0).float()


def token_logps(model, rollouts, temperature):
    """log π_θ(o_t | q, o_<t) of every completion token, rollout after rollout: [Σ|o_i|], fp32.

    Padding is on the right, where a causal model never looks. The logits at a place predict the
    token at the next one, so those before the end of the shortest prompt are not needed. Here
    `first` is 1, and the targets are at places 1 to 3:

        place                           0 1 2 3
        prompt a b, completion C D      a b C D     the logits at places 1 and 2 predict C and D
        prompt e,   completion F        e F . .     the logits at place 0 predict F
    """
    ids = pad([r.prompt + r.completion for r in rollouts], "right", model.device)  # [B, L]
    masks = [[0] * len(r.prompt) + [1] * len(r.completion) for r in rollouts]
    first = min(len(r.prompt) for r in rollouts)  # the first place that can hold a completion
    targets = ids[:, first:]  # [B, L - first]
    is_completion = pad(masks, "right", model.device)[:, first:].bool()  # [B, L - first]
    needed = targets.shape[1]
    with autocast(model):
        output = model(ids[:, :-1], use_cache=False, logits_to_keep=needed)
    logits = output.logits[:, -needed:]  # [B, L - first, V]; some models keep all places
    logits = logits[is_completion].float() / temperature  # [Σ|o_i|, V]
    return -torch.nn.functional.cross_entropy(logits, targets[is_completion], reduction="none")


def policy_loss(logps, old_logps, advantages, weights, clip_epsilon):
    """-J = -Σ_t w_t min(r_t A_t, clip(r_t, 1-ε, 1+ε) A_t) with r_t = π_θ / π_old, both under q.

    Eq. 11. Inputs are [tokens]. Returns the loss [] and where the clip acts, [tokens].
    """
    ratio = (logps - old_logps).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantages
    loss = -(weights * torch.minimum(unclipped, clipped)).sum()
    return loss, clipped < unclipped


def kl_loss(logps, reference_logps, weights):
    """Σ_t w_t (r_t - log r_t - 1) with r_t = π_ref / π_θ: the k3 estimator of D_KL(π_θ ‖ π_ref)."""
    log_ratio = reference_logps - logps
    return (weights * (log_ratio.exp() - log_ratio - 1)).sum()


def mean(values):
    """The mean, or None (null in metrics.jsonl) where there was nothing to measure."""
    values = list(values)
    return sum(values) / len(values) if values else None


def micro_batches(rollouts, indices, max_tokens) -> list[list[int]]:
    """The indices in batches of equally many rows (the last may have fewer): as many as the longest
    rollout lets into `max_tokens`, at least one. The longest come first: memory runs out at once or
    never.
    """
    sizes = {i: len(rollouts[i].prompt) + len(rollouts[i].completion) for i in indices}
    order = sorted(sizes, key=sizes.get, reverse=True)
    rows = max(1, max_tokens // max(sizes.values(), default=1))
    return [order[i : i + rows] for i in range(0, len(order), rows)]


def sampler_diff(rollouts, logps) -> float:
    """max |log π of the sampler - log π of the trainer| over the tokens sampled under q, in nats.

    Errors: RepoError above 5 nats, which no rounding explains.
    """
    largest = 0.0
    per_rollout = logps.cpu().split([len(r.completion) for r in rollouts])
    for r, trained in zip(rollouts, per_rollout):
        if r.sampler_logps:
            difference = trained - torch.tensor(r.sampler_logps)
            largest = max(largest, difference.abs().max().item())
    if largest > 5:
        raise RepoError(f"sampler and trainer are {largest:.1f} nats apart on a token: this model "
                        "ignores positions or attention masks, or keeps a cache whose rows cannot "
                        "be rearranged; use another")
    return largest


def update(model, optimizer, groups, cfg, reference=None) -> dict:
    """Step 4: `updates_per_batch` optimizer steps on the final groups. Returns metrics.

    With one update the policy that is trained is the one that sampled: the ratio is exactly 1, the
    clip never acts and the gradient is REINFORCE's; the loss is then near 0, as the advantages of a
    group sum to 0. A batch without signal changes nothing (ours).
    Errors: RuntimeError, before that step, if the gradient is not finite.
    """
    rewards = [[r.reward for r in group] for group in groups]
    rewards = torch.tensor(rewards, dtype=torch.float64)  # [B, G]
    advantages = group_advantages(rewards).flatten().to(model.device)  # [N]
    rollouts = [r for group in groups for r in group]
    lengths = torch.tensor([len(r.completion) for r in rollouts], device=model.device)  # [N]
    weights = 1 / (len(rollouts) * lengths)  # [N], of each token: 1/(B G) Σ_i 1/|o_i| Σ_t (paper)

    # The weights are fixed now: neither leaving out rollouts that have no gradient nor cutting the
    # rest into micro-batches can change the sum.
    trained = [i for i, advantage in enumerate(advantages.tolist()) if advantage or cfg.kl_beta]
    batches = micro_batches(rollouts, trained, cfg.micro_batch_tokens)

    old_logps, losses, kls, norms, clipped, sampler_diffs = [], [], [], [], [], []
    for epoch in range(cfg.updates_per_batch if batches else 0):
        for n, batch in enumerate(batches):
            part = [rollouts[i] for i in batch]
            logps = token_logps(model, part, cfg.temperature)  # [tokens]
            if epoch == 0:
                # π_old(·|q) is this first pass itself, for o_rep too, although π(·|P(q,k)) wrote it
                # (ours): it costs nothing, and no other code path can disturb the ratio.
                old_logps.append(logps.detach())
                sampler_diffs.append(sampler_diff(part, old_logps[n]))
            token_advantages = advantages[batch].repeat_interleave(lengths[batch])  # [tokens]
            token_weights = weights[batch].repeat_interleave(lengths[batch])  # [tokens]
            loss, is_clipped = policy_loss(logps, old_logps[n], token_advantages, token_weights,
                                           cfg.clip_epsilon)
            if cfg.kl_beta:
                with torch.no_grad():
                    reference_logps = token_logps(reference, part, cfg.temperature)
                kl = kl_loss(logps, reference_logps, token_weights)
                loss = loss + cfg.kl_beta * kl
                kls.append(kl.item())
            loss.backward()
            losses.append(loss.item())
            clipped += is_clipped.tolist()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm,
                                              error_if_nonfinite=True)
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    return {
        "loss": sum(losses) / cfg.updates_per_batch,
        "kl": sum(kls) / cfg.updates_per_batch if kls else None,
        "grad_norm": mean(norms),  # before it is scaled down
        "clip_ratio": mean(clipped),
        "sampler_logp_diff": max(sampler_diffs, default=None),
    }


# ---------------------------------------------------------------------------- the algorithm box


@torch.no_grad()
def mean_logp(model, rollouts, cfg):
    """The mean over all tokens of log π(o_t | q, o_<t), in nats: how likely are these texts?"""
    logps = []
    for batch in micro_batches(rollouts, range(len(rollouts)), cfg.micro_batch_tokens):
        logps += token_logps(model, [rollouts[i] for i in batch], cfg.temperature).tolist()
    return mean(logps)


def train_step(model, tokenizer, optimizer, problems, cfg, reward_fn, reference=None):
    """One step of RePO on `problems`, dicts of question, knowledge and answer. Trains in place.

    `reference` is the model of the KL term's π_ref. Returns (metrics, the groups as trained, the
    guides that were offered). Errors: RepoError if kl_beta is set and no reference is given.
    """
    if cfg.kl_beta and reference is None:
        raise RepoError(f"kl_beta is {cfg.kl_beta} and there is no reference model; pass one")
    model.eval()  # with dropout the trained policy would not be the one that was sampled
    start = time.perf_counter()

    # 1. Rollout.
    groups = rollout(model, tokenizer, problems, cfg.group_size, cfg.temperature, cfg, reward_fn)
    sampled = [r for group in groups for r in group]  # the policy's own, before any replacement
    sampled_at = time.perf_counter()

    # 2. Rephrase, only where the gate of step 3 is open: a closed one then costs nothing (ours).
    opened = []
    for n, group in enumerate(groups):
        rewards = [r.reward for r in group]
        if cfg.guidance != "none" and gate_opens(rewards, cfg.fail_threshold, cfg.gate_threshold):
            opened.append(n)
    hard = [problems[n] for n in opened]
    rephrases = []
    if hard and cfg.guidance == "rephrase":
        rephrases = rephrase(model, tokenizer, hard, cfg)

    # How near to the policy is each kind of text? Its log-probability under q, where gates opened.
    end = end_tokens(model, tokenizer)[:1]
    experts = [as_rollout(tokenizer, p, p["knowledge"], end, cfg) for p in hard]
    own = [r for n in opened for r in groups[n]]
    policy_gap = {
        "policy_gap/expert": mean_logp(model, experts, cfg),
        "policy_gap/rephrase": mean_logp(model, rephrases, cfg),
        "policy_gap/rollout": mean(logp for r in own for logp in r.sampler_logps),
    }

    # 3. Injection. Plain GRPO has no guides, so nothing happens.
    guides = experts if cfg.guidance == "verbatim" else rephrases
    injections = 0
    for n, guide in zip(opened, guides):
        guide.reward = checked_reward(reward_fn, guide.text, problems[n])
        if replace_worst(groups[n], guide):
            injections += 1
    rephrased_at = time.perf_counter()

    # 4. Update.
    updated = update(model, optimizer, groups, cfg, reference)

    metrics = {
        "reward": mean(r.reward for r in sampled),
        "fail_rate": mean(r.reward < cfg.fail_threshold for r in sampled),
        "injections": injections,
        "rephrase_success": mean(r.reward >= cfg.fail_threshold for r in rephrases),
        **policy_gap,
        "entropy": -mean(logp for r in sampled for logp in r.sampler_logps),  # estimated, in nats
        "frac_reward_zero_std": mean(len({r.reward for r in group}) == 1 for group in groups),
        "completions/mean_length": mean(len(r.completion) for r in sampled),
        "completions/clipped_ratio": mean(r.truncated for r in sampled),
        **updated,
        "seconds/sample": sampled_at - start,
        "seconds/rephrase": rephrased_at - sampled_at,
        "seconds/update": time.perf_counter() - rephrased_at,
    }
    return metrics, groups, guides


def accuracy(model, tokenizer, problems, cfg, reward_fn):
    """The share of problems, 0 to 1, whose greedy completion does not fail."""
    model.eval()
    answers = []
    size = cfg.batch_size * cfg.group_size
    for i in range(0, len(problems), size):
        answers += rollout(model, tokenizer, problems[i : i + size], 1, 0.0, cfg, reward_fn)
    return mean(answer.reward >= cfg.fail_threshold for (answer,) in answers)


# ------------------------------------------- here the paper ends. A reward for mathematics (ours)

NUMBER = (  # "12", "1,200", "1.5", ".5" or "3/4", but not "1,20"
    r"[+-]?(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?"
    r"|\.[0-9]+|[0-9]+/0*[1-9][0-9]*)"
)
UNIT = (  # \text{ cm}^2, but neither a constant nor a conjunction
    r"\\(?:text|mathrm|mbox)\{ ?(?!(?:[eix]|pi|or|and|to)\b)[a-zA-Z][a-zA-Z ./²³-]*\}"
    r"(?:\^\{?[23]\}?)?"
)
REWRITES = [  # pattern, replacement: one after the other, each on what the ones before it left
    ("−", "-"),
    (r"(?<=[0-9])(?:\{,\}|,\\!|\\[,!])(?=[0-9]{3})", ","),  # 1{,}000 and 1\,000
    (r"\\(?:left|right)(?![a-z])\.?|(?<!\\)\\[,;:!$% ]|[$~]", " "),
    (r"[%°]|\^ ?\\circ|\^ ?\{\\circ\}|\\degree", " "),
    (r"\s+", " "),
    (r" ?([^\w ,.]) ?", r"\1"),  # blanks around signs
    (r"\.$", ""),
    (r"^\\?(?!not=)[a-zA-Z]\w*=", ""),  # x =
    (r"^\{+((?:[^{}]|\{[^{}]*\})*)\}+$", r"\1"),  # {{42}}
    (r"\\[dt]frac", r"\\frac"),
    (rf"^([+-]?)\\frac\{{(-?[\w.\\]+)\}}\{{([0-9]+|[a-z]|\\[a-z]+)\}}(?=(?:{UNIT})?$)", r"\1\2/\3"),
    (rf"^({NUMBER}){UNIT}$", r"\1"),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}", r" \1 "),
]


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, inner braces included; None if none or never closed."""
    _, found, tail = text.rpartition(r"\boxed")
    tail = tail.lstrip()
    depth = 0
    for i, char in enumerate(tail if found and tail.startswith("{") else ""):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return tail[1:i]
    return None


def normalise(answer: str) -> Fraction | str:
    r"""An exact number, or else text without typography; 2+2 is text, as nothing is evaluated."""
    for pattern, replacement in REWRITES:
        answer = re.sub(pattern, replacement, answer.strip())
    answer = answer.strip()
    if re.fullmatch(NUMBER, answer) and len(answer) < 1000:
        return Fraction(answer.replace(",", ""))
    answer = re.sub(" ?, ?", ",", answer)
    return answer.casefold() if re.fullmatch("[a-zA-Z ]{2,}", answer) else answer


def boxed_reward(completion: str, answer: str) -> float:
    r"""1.0 if the last `\boxed{...}` is the answer, else 0.0, for any string, in linear time.

    When in doubt 0.0: a false "right" teaches a mistake, a false "wrong" only misses a chance.
    """
    box = normalise(last_boxed(completion) or "")
    return float(box != "" and box == normalise(answer))


# --------------------------------------- the command line: a real model, real data, one device


@dataclass(frozen=True)
class Run:
    """What to train on what, and where to."""

    model: str = setting(MISSING, "hub name or folder of a causal language model")
    dataset: str = setting(MISSING, "hub name, or a .json, .jsonl, .csv or .parquet file")
    out: str = setting(MISSING, "folder for metrics.jsonl, the checkpoint and the model")
    subset: str | None = setting(None, "configuration of the dataset, where it has several")
    split: str = setting("train", "split to train on, also a slice: train[:1000]")
    eval_split: str | None = setting(None, "split for the accuracy before and after training")
    question_column: str = setting("question", "column of the question")
    knowledge_column: str = setting("answer", "column of the expert's solution")
    answer_column: str = setting("answer", "column of the answer, bare, boxed or after ####")
    steps: int = setting(100, "training steps")
    save_every: int = setting(50, "steps between checkpoints; 0: at the end only")
    resume: bool = setting(False, "go on from the checkpoint in --out")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cuda, cuda:1, cpu ...")


def load_model(name, device):
    """(model with fp32 weights, tokenizer), by the library's defaults: no remote code is run."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    return model.to(device), AutoTokenizer.from_pretrained(name)


def in_box(value) -> str:
    r"""A column's value as text; GSM8K's `#### 42` becomes `\boxed{42}`, and its `<<..>>` go."""
    text = re.sub(r"<<[^<>]*=[^<>]*>>", "", "" if value is None else str(value))
    return re.sub(r"####\s*(\S.*)", r"\\boxed{\1}", text).strip()


def load_problems(run: Run, split: str) -> list[dict]:
    """The split as dicts of question, knowledge and answer.

    A record that lacks one of them is left out, and counted. Errors: RepoError if the dataset
    cannot be read, has not these columns, or when nothing is left.
    """
    readers = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    reader = readers.get(Path(run.dataset).suffix)  # None: a dataset of the hub
    files = run.dataset if reader else None
    try:
        data = load_dataset(reader or run.dataset, run.subset, data_files=files, split=split)
    except Exception as error:  # an empty file is a StopIteration
        raise RepoError(f"{run.dataset!r} has no readable split {split!r}: {error!r}") from error
    for column in (run.question_column, run.knowledge_column, run.answer_column):
        if column not in data.column_names:
            raise RepoError(f"the dataset has no column {column!r}, but {data.column_names}; "
                            "set --question-column, --knowledge-column and --answer-column")
    problems = []
    for record in data:
        question = str(record[run.question_column] or "").strip()
        knowledge = in_box(record[run.knowledge_column])
        answer = in_box(record[run.answer_column])
        boxed = last_boxed(answer)
        if boxed or run.answer_column == run.knowledge_column:  # a solution's answer is its box
            answer = boxed
        if question and knowledge and answer:
            problems.append(dict(question=question, knowledge=knowledge, answer=answer))
    print(f"{len(problems)} of {len(data)} records have question, knowledge and answer")
    if not problems:
        raise RepoError(f"{run.dataset!r} has no usable record in {split!r}; check the columns")
    return problems


def check_lengths(problems, model, tokenizer, cfg):
    """Errors: RepoError naming the first problem that does not fit the model's context.

    P(q,k) is the longest prompt, and holds the expert's text.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    for problem in problems:
        prompt = encode_prompt(tokenizer, fill(cfg.rephrase_prompt, problem))
        if len(prompt) + cfg.max_new_tokens > context:
            raise RepoError(f"{len(prompt)} tokens of P(q,k) and max_new_tokens "
                            f"{cfg.max_new_tokens} do not fit the model's context of {context}; "
                            f"lower that or drop the problem: {problem['question']}")


def draw_batch(problems, step, cfg) -> list[dict]:
    """The problems of a step; also seeds its sampling. Both depend on seed and step alone, so a
    resumed run needs no random state to equal one that was never stopped, on the same device. Each
    step draws from all problems, without epochs (ours).
    """
    draw = random.Random(f"{cfg.seed} {step}")
    torch.manual_seed(draw.getrandbits(32))
    return draw.sample(problems, min(cfg.batch_size, len(problems)))


MAY_CHANGE = {"out", "steps", "save_every", "resume", "device", "micro_batch_tokens"}  # on resume


def save_checkpoint(file, log, model, optimizer, settings):
    """Writes beside the old file and then moves over it: a kill leaves the old one or the new."""
    partial = file.with_suffix(".partial")
    state = dict(log=log, settings=settings, model=model.state_dict(),
                 optimizer=optimizer.state_dict())
    torch.save(state, partial)
    os.replace(partial, file)


def load_checkpoint(file, model, optimizer, settings) -> list[str]:
    """Restores model and optimizer and returns the log, a line for each step done.

    Errors: RepoError if a setting has changed.
    """
    state = torch.load(file, map_location="cpu", weights_only=True)
    for name, value in state["settings"].items():
        if settings[name] != value and name not in MAY_CHANGE:
            raise RepoError(f"{file} was made with {name} = {value!r}, and now it is "
                            f"{settings[name]!r}; change it back or choose another --out")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["log"]


def train(run: Run, cfg: Config):
    """The run of the command line. Errors: RepoError if --out holds a run, without --resume."""
    out = Path(run.out)
    checkpoint, metrics_file = out / "checkpoint.pt", out / "metrics.jsonl"
    used = checkpoint.exists() or (metrics_file.exists() and metrics_file.read_text())
    if used and not run.resume:
        raise RepoError(f"{run.out!r} holds a run; go on with --resume or choose another --out")
    model, tokenizer = load_model(run.model, run.device)
    reference = load_model(run.model, run.device)[0] if cfg.kl_beta else None
    problems = load_problems(run, run.split)
    held_out = load_problems(run, run.eval_split) if run.eval_split else []
    check_lengths(problems + held_out, model, tokenizer, cfg)
    before = accuracy(model, tokenizer, held_out, cfg, boxed_reward)  # of --model, also on resume

    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate, weight_decay=0.0,
                                  fused=True)
    settings = {**asdict(run), **asdict(cfg)}
    log = []
    if checkpoint.exists():
        log = load_checkpoint(checkpoint, model, optimizer, settings)
    out.mkdir(parents=True, exist_ok=True)
    metrics_file.write_text("".join(log))  # a killed run may be past its checkpoint

    for step in range(len(log), run.steps):
        batch = draw_batch(problems, step, cfg)
        metrics, _, _ = train_step(model, tokenizer, optimizer, batch, cfg, boxed_reward, reference)
        log.append(json.dumps({"step": step, **metrics}) + "\n")
        with metrics_file.open("a") as file:
            file.write(log[-1])
        print(f"step {step}: reward {metrics['reward']:.3f}, {metrics['injections']} injections")
        if step + 1 == run.steps or (run.save_every and (step + 1) % run.save_every == 0):
            save_checkpoint(checkpoint, log, model, optimizer, settings)

    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    after = accuracy(model, tokenizer, held_out, cfg, boxed_reward)
    summary = json.dumps(dict(accuracy_before=before, accuracy_after=after))
    (out / "summary.json").write_text(summary)
    print(summary)


def main(argv=None):
    """Parses the flags and trains; a RepoError ends in its message alone."""
    parser = HfArgumentParser((Run, Config), description=__doc__.partition("\n")[0])
    try:
        run, cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown: {' '.join(unknown)}; --help lists the flags")
        train(run, cfg)
    except RepoError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on from the last checkpoint, if there is one")


if __name__ == "__main__":
    main()
