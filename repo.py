r"""RePO: Rephrasing Policy Optimization (arXiv 2602.10819), a reference implementation in one file.

RePO teaches a language model, the policy π_θ, what it cannot yet answer. Each question q comes
with an expert's solution k and an answer that can be checked. Where all rollouts of q fail, GRPO
has no signal. RePO shows k to the policy, which writes the solution in its own words. That text
is trained as if the policy had found it alone.

We have not read the full paper, and its authors have published no code. Marks tell the source:
[paper] is the abstract. [reported] is what independent readers of the paper say; the equation
numbers come from them too. [ours] is our choice: readers say nothing of it, or disagree.

ONE STEP. π_old is the policy at the start of the step.
  1. Rollout    o_1..o_G ~ π_old(·|q), with rewards R_1..R_G                              [paper]
  2. Rephrase   o_rep ~ π_old(·|P(q,k)): the prompt P shows q and k, Eq. 5                [paper]
                o_rep is cleaned, so that it does not speak of k                       [reported]
  3. Injection  γ_fail = 1/G Σ_i 1[R_i < δ]                                            [reported]
                if γ_fail ≥ ρ, o_rep replaces the rollout of lowest reward             [reported]
                but only if o_rep earns more than that rollout                             [ours]
  4. Update     A_i = (R_i - mean R) / std R                                           [reported]
                r_i,t = π_θ(o_i,t | q, o_i,<t) / π_old(o_i,t | q, o_i,<t), Eq. 11      [reported]
                J = 1/G Σ_i 1/|o_i| Σ_t min(r_i,t A_i, clip(r_i,t, 1-ε, 1+ε) A_i)      [reported]
                averaged over all questions, minus β KL(π_θ ‖ π_ref) if β > 0          [reported]

WHAT IS LEFT OF THE CLIPPED OBJECTIVE (PPO's), with the default ρ = 1, β = 0 and one update a batch,
for rewards of 0 and 1:
  - Every ratio is 1 and the clip never acts. The gradient is REINFORCE's with advantages A_i.
  - A group of equal rewards has advantages of 0. It teaches nothing.
  - In an injected group the rewards are 1, 0 .. 0. Their mean is 1/G, their unbiased std 1/√G. So
    o_rep has the advantage (G-1)/√G and each failure -1/√G: 2.47 and -0.35 for G = 8.
  - Such a group is supervised learning of a verified text, plus a push away from the failures.

WHAT WE CHOSE, beside the marks:
  - o_rep is written only where the gate opens. Readers report one for every question, and then a
    group of G + 1 that loses its worst. Where the gate opens, that comes to the same.
  - A draft that was cut off, or that still speaks of k after cleaning, is never injected.
  - std is the unbiased one, plus 1e-6. The ratio divides by the log-probabilities that the update
    itself computes before any weight moves, not by those of the sampler.

WHAT IS NOT LITERALLY TRUE:
  - "On-policy", the paper's word. o_rep is drawn under P(q,k) and trained under q. Its ratio
    divides by π_old(·|q), which did not write it. And only texts that earn more go in.
  - "o_rep ~ π_old(·|P(q,k))". By default the draft is greedy, and cleaning may shorten it.
  - "Verified". The reward checks the answer, which k shows. The steps may still be wrong.

KIN, in a line each:
  GRPO               no injection (--guidance none)
  STaR, 2203.14465   supervised learning of the policy's own verified texts, without failures
  LUFFY, 2504.14945  the expert's own text in the group, with a shaped ratio
  Guide, 2506.13923  a hint where all rollouts fail; the ratio divides by the hinted policy

    python repo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k --subset main --out out
"""

import copy
import glob
import json
import math
import numbers
import os
import random
import re
import statistics
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from datasets import List, Value, load_dataset
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import DynamicCache, HfArgumentParser


class RepoError(ValueError):
    """What was given cannot work. The message names it and says what to do."""


def require(condition, message):
    """Raises a RepoError with the message unless the condition holds."""
    if not condition:
        raise RepoError(message)


@contextmanager
def explaining(what, advice):
    """Whatever a library raises in the block becomes a RepoError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:400]
        raise RepoError(f"{what}: {reason}; {advice}") from error


# ------------------------------------------------------------------------------------- settings

QUESTION_PROMPT = "{question}\n\nReason step by step and put the final answer in \\boxed{}."

REPHRASE_PROMPT = """{question}

Your notes for the answer:
{knowledge}

Understand them. Then write the full answer from them in your own words: explain every step, with \
its calculation and its result. End with: The final answer is \\boxed{...}"""


def option(default, meaning):
    """A field of the settings, with its line in --help."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Config:
    """The settings of the algorithm.

    Each line ends with two sources: that of the mechanism and that of the default value. Where
    readers do not report the paper's value, the value is ours.
    """

    group_size: int = option(8, "G: rollouts of a question [reported, reported]")
    batch_size: int = option(16, "questions in a step; 512 is reported [reported, ours]")
    max_new_tokens: int = option(512, "the longest completion in tokens [ours, ours]")
    temperature: float = option(1.0, "T: the policy is softmax(logits / T) [ours, ours]")
    rephrase_temperature: float = option(0.0, "T of the drafts; 0 is greedy [ours, ours]")
    guidance: str = option(
        "rephrase", "what goes in: rephrase, verbatim (expert's text), none (GRPO) [paper, paper]"
    )
    fail_threshold: float = option(0.5, "δ: a lower reward is a failure [reported, ours]")
    gate_threshold: float = option(1.0, "ρ: share of failures that opens the gate [reported, ours]")
    clip_epsilon: float = option(0.2, "ε: the clip keeps ratios within 1 ± ε [reported, ours]")
    kl_beta: float = option(0.0, "β: weight of the KL term; 0 needs no reference [reported, ours]")
    updates_per_batch: int = option(1, "optimizer steps on a batch [ours, ours]")
    learning_rate: float = option(1e-6, "of AdamW: constant, without weight decay [ours, reported]")
    max_grad_norm: float = option(1.0, "a larger gradient is scaled down to it [ours, ours]")
    micro_batch_tokens: int = option(4096, "padded tokens in a pass of the update [ours, ours]")
    checkpoint_layers: bool = option(False, "less memory and more time in the update [ours, ours]")
    question_prompt: str = option(QUESTION_PROMPT, "q, as the user's turn [ours, ours]")
    rephrase_prompt: str = option(REPHRASE_PROMPT, "P(q,k), as the user's turn [paper, ours]")
    seed: int = option(0, "of the sampling and of the batches [ours, ours]")

    def __post_init__(self):
        """Raises: RepoError for a value out of range."""
        limits = {
            "group_size": self.group_size >= 2,  # or there is nothing to compare
            "batch_size": self.batch_size >= 1,
            "max_new_tokens": self.max_new_tokens >= 1,
            "updates_per_batch": self.updates_per_batch >= 1,
            "micro_batch_tokens": self.micro_batch_tokens >= 1,
            "temperature": self.temperature > 0,
            "rephrase_temperature": self.rephrase_temperature >= 0,
            "guidance": self.guidance in ("rephrase", "verbatim", "none"),
            "fail_threshold": 0 < self.fail_threshold <= 1,
            "gate_threshold": 0 <= self.gate_threshold <= 1,
            "clip_epsilon": self.clip_epsilon >= 0,
            "kl_beta": self.kl_beta >= 0,
            "learning_rate": self.learning_rate > 0,
            "max_grad_norm": self.max_grad_norm > 0,
            "question_prompt": "{question}" in self.question_prompt,
            "rephrase_prompt": "{knowledge}" in self.rephrase_prompt,
        }
        for name, kept in limits.items():
            require(kept, f"{name} cannot be {getattr(self, name)!r}; see --help")
        require("{knowledge}" not in self.question_prompt, "question_prompt must not show the hint")


@dataclass
class Completion:
    """One text that answers a question: a rollout, a draft, a rephrase or an expert's text."""

    problem: dict  # its question, knowledge and answer
    prompt: list  # token ids of q; only of a draft those of P(q,k)
    tokens: list  # token ids of the answer, all trained; the last is the end token, if there is one
    text: str  # what the tokens say, without the end token
    truncated: bool = False  # max_new_tokens came first: there is no end token
    sampler_logps: list | tuple = ()  # log π of each token, in nats, as the sampler drew it
    old_logps: list | tuple = ()  # log π_old(·|q) of each token, in nats, once it is trained
    reward: float = 0.0  # set by `assign_rewards`
    advantage: float | None = None  # set by `assign_advantages`, if it is in a group
    draft: "Completion | None" = None  # of a rephrase: the text before cleaning
    replaced: "Completion | None" = None  # of an injected text: the rollout that it replaced

    @property
    def ids(self):
        """Prompt and answer, as the update reads them."""
        return self.prompt + self.tokens


# ---------------------------------------------------------------------------- the whole method


def train_step(model, tokenizer, optimizer, problems, cfg, reward_fn, reference=None):
    """One step of RePO on `problems`, a list of dicts of question, knowledge and answer.

    `reward_fn(text, answer)` returns a number, below δ if the text is wrong. `reference` is π_ref
    of the KL term. Trains `model` in place. Returns (metrics, groups, guides). The groups are
    as trained. The guides are the texts written for the groups whose gate opened, injected or not.
    """
    model.eval()  # with dropout the trained policy would not be the sampled one

    # 1. Rollout.
    groups = rollout(model, tokenizer, problems, cfg.group_size, cfg.temperature, cfg, reward_fn)
    rollouts = sum(groups, [])  # as sampled: the injection changes `groups`, not this list

    # 2. Rephrase, where the gate opens. With --guidance none (GRPO) nothing is written.
    stuck = [g for g in groups if cfg.guidance != "none" and gate_opens(g, cfg)]
    guides = write_guides(model, tokenizer, stuck, cfg, reward_fn)  # one for each stuck group

    # 3. Injection. It changes `groups` too, because `stuck` holds the same lists.
    for group, guide in zip(stuck, guides):
        replace_worst(group, guide)

    # 4. Update under the plain q. The experts' texts are measured before the weights move.
    assign_advantages(groups)
    expert_logps = measure_experts(model, tokenizer, guides, cfg)
    metrics = update(model, optimizer, groups, cfg, reference)
    return metrics | step_metrics(rollouts, guides, expert_logps, cfg), groups, guides


def mean(values):
    """The mean, or None (null in metrics.jsonl) where there was nothing to measure."""
    values = list(values)
    return sum(values) / len(values) if values else None


def chunks(items, size):
    """The items in lists of `size`; the last list may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


# ------------------------------------------------------------------------------------ 1. rollout


def rollout(model, tokenizer, problems, num_samples, temperature, cfg, reward_fn):
    """o_1..o_G ~ π_old(·|q) with their rewards: a list of completions for each problem.

    `accuracy` calls it too, for one greedy sample.
    """
    groups = draw_completions(
        model, tokenizer, cfg.question_prompt, problems, num_samples, temperature, cfg
    )
    assign_rewards(sum(groups, []), reward_fn)
    return groups


def assign_rewards(completions, reward_fn):
    """Sets R(o) = `reward_fn(text, answer)`, of truncated texts too (ours).

    Raises: RepoError with question and text if a reward is not a finite number.
    """
    for o in completions:
        reward = reward_fn(o.text, o.problem["answer"])
        require(
            isinstance(reward, numbers.Real) and math.isfinite(reward),
            f"the reward function must return a finite number, and returned {reward!r}"
            f"\nquestion: {o.problem['question']}\ncompletion: {o.text}",
        )
        o.reward = float(reward)


def draw_completions(model, tokenizer, template, problems, num_samples, temperature, cfg):
    """`num_samples` answers to each problem in the template, a list for each. No rewards yet.

    `encode_prompt` and `end_tokens` know the chat template. They stand below, where the paper ends.
    """
    ends = end_tokens(model, tokenizer)
    prompts = [encode_prompt(tokenizer, fill(template, problem)) for problem in problems]
    drawn = sample(model, prompts, num_samples, cfg.max_new_tokens, temperature, ends)
    completions = []
    for i, (tokens, logps) in enumerate(drawn):
        n = i // num_samples  # the samples of a prompt stand side by side
        truncated = tokens[-1] not in ends
        # Control tokens within the answer stay visible, so that cleaning can refuse them.
        text = tokenizer.decode(tokens if truncated else tokens[:-1])
        completions.append(Completion(problems[n], prompts[n], tokens, text, truncated, logps))
    return chunks(completions, num_samples)


@torch.no_grad()
def sample(model, prompts, num_samples, max_new_tokens, temperature, ends):
    """Draws `num_samples` completions of each prompt from exactly softmax(logits / T).

    `prompts` are B lists of token ids. A completion ends with its first token in `ends`, or after
    `max_new_tokens` tokens. Returns B * num_samples pairs (token ids, log-probability of each in
    nats), those of a prompt side by side. T = 0 is greedy, with the log-probabilities of T = 1.

    `model.generate` is no substitute: it follows the checkpoint's top-k, top-p and penalties.
    Raises: RepoError if the rows of the model's cache cannot be rearranged.
    """
    inputs = pad(prompts, "left", model.device)  # what the model reads next: first [B, P]
    mask = pad([[1] * len(prompt) for prompt in prompts], "left", model.device)  # 1: real token
    cache = None
    completions = [([], []) for _ in range(len(prompts) * num_samples)]  # token ids, log π
    unfinished = list(completions)  # once the prompts are read, row r writes unfinished[r]

    for length in range(max_new_tokens):
        # A token's position is the number of real tokens before it: a mask of 0 0 1 1 1 gives
        # 0 0 0 1 2. Only those of `inputs` are passed: all of the prompt, then the last one.
        positions = (mask.cumsum(1) - mask)[:, -inputs.shape[1] :]
        with autocast():
            output = model(
                inputs,
                attention_mask=mask,
                position_ids=positions,
                cache=cache,  # the name of past_key_values since transformers 5.24
                use_cache=True,
                logits_to_keep=1,
            )
        logits, cache = output.logits[:, -1].float(), output.get("cache")  # [rows, V]
        if length == 0:
            # A model's own cache class may hold states that `reorder_cache` does not move.
            require(
                type(cache) is DynamicCache,
                f"{type(model).__name__} keeps no cache whose rows can be rearranged; use another "
                "model, and the transformers of requirements.txt",
            )
            # Each prompt was read once. Now its row is copied for its samples: with two prompts of
            # three samples the new rows are the old rows 0 0 0 1 1 1.
            rows = torch.arange(len(prompts), device=model.device).repeat_interleave(num_samples)
            logits, mask = logits[rows], mask[rows]
            cache.reorder_cache(rows)

        scores = logits / (temperature or 1.0)
        policy = torch.distributions.Categorical(logits=scores, validate_args=False)  # faster
        tokens = policy.sample() if temperature else policy.mode  # [rows]
        logps = policy.log_prob(tokens)  # [rows]
        for (ids, ids_logps), token, logp in zip(unfinished, tokens.tolist(), logps.tolist()):
            ids.append(token)
            ids_logps.append(logp)

        # Finished rows leave the batch: if row 1 of 0 1 2 3 has ended, 0 2 3 go on.
        going = [row for row, (ids, _) in enumerate(unfinished) if ids[-1] not in ends]
        if not going:
            break
        if len(going) < len(unfinished):
            unfinished = [unfinished[row] for row in going]
            rows = torch.tensor(going, device=model.device)
            tokens, mask = tokens[rows], mask[rows]
            cache.reorder_cache(rows)
        inputs = tokens[:, None]  # [rows, 1]
        mask = torch.hstack([mask, torch.ones_like(inputs)])
    return completions


def pad(rows, side, device):
    """Lists of unequal lengths as one tensor [B, longest], filled with 0 on the given side."""
    tensors = [torch.tensor(row, device=device) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side)


def autocast():
    """On CUDA bf16 matrix products over fp32 weights, elsewhere fp32.

    Logits become fp32 before the softmax over the vocabulary. Weights stay fp32: next to a weight
    of 0.01, bf16 cannot hold an update of 1e-6. Cards that only emulate bf16 (T4, V100) use fp32,
    which is faster there.
    """
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, enabled=bf16)  # does nothing on a CPU


# ----------------------------------------------------------------------------------- 2. rephrase


def write_guides(model, tokenizer, groups, cfg, reward_fn):
    """A guide for each group, with its reward: the text that may be injected.

    That is o_rep, or with --guidance verbatim the expert's own text.
    """
    if not groups:
        return []
    if cfg.guidance == "verbatim":
        guides = expert_completions(model, tokenizer, [group[0] for group in groups])
    else:
        guides = rephrase(model, tokenizer, groups, cfg)
    assign_rewards(guides, reward_fn)
    return guides


def rephrase(model, tokenizer, groups, cfg):
    """o_rep for the question of each group (Eq. 5): a draft under P(q,k), cleaned.

    Where cleaning cuts nothing, o_rep has the draft's own tokens. A cut text is encoded anew. A
    truncated draft is refused, because it would teach the policy not to end. A refused draft gives
    an o_rep without text, which is never injected.
    """
    problems = [group[0].problem for group in groups]
    drafts = draw_completions(
        model, tokenizer, cfg.rephrase_prompt, problems, 1, cfg.rephrase_temperature, cfg
    )
    rephrases = []
    for group, [draft] in zip(groups, drafts):
        record = f"{draft.problem['question']} {draft.problem['knowledge']}"
        text = "" if draft.truncated else clean_rephrase(draft.text, record)
        if not text:
            tokens = []
        elif text == draft.text.strip():
            tokens = draft.tokens
        else:
            tokens = encode_answer(tokenizer, text, draft.tokens[0]) + draft.tokens[-1:]
        # The prompt is that of the rollouts, the plain q: no hint is left in the update (Eq. 11).
        rephrases.append(Completion(draft.problem, group[0].prompt, tokens, text, draft=draft))
    return rephrases


def expert_completions(model, tokenizer, completions):
    """The experts' own texts, each in the place of a completion, closed by an end token."""
    end = end_tokens(model, tokenizer)[0]
    experts = []
    for o in completions:
        text = o.problem["knowledge"]
        tokens = encode_answer(tokenizer, text, o.tokens[0]) + [end]
        experts.append(Completion(o.problem, o.prompt, tokens, text))
    return experts


def clean_rephrase(text, record=""):
    """The draft as a direct answer to q, or "" if it is refused.

    1. A draft with thoughts or control tokens is refused.
    2. Lines of chat ("Sure!") or about the source ("According to the notes:") are cut from both
       ends. A line with a digit, a sign of mathematics or a single capital is never cut.
    3. What still has chat at an end, speaks of the source, or is a torn sentence, is refused. A cut
       within a line or in the middle would leave a hole in the text.

    A word about the source is allowed if `record`, question and solution, uses it itself. That such
    talk is deleted is reported. The refusals and the words are ours. The words stand below, where
    the paper ends.
    """
    if CONTROL.search(text):
        return ""

    def about_source(part):
        plain = re.sub(r"[*_\s]+", " ", part)
        words = map("".join, SOURCE.findall(plain))
        return any(not re.search(rf"(?i)\b{word}", record) for word in words)

    def may_go(line):
        meta = not re.search(r"\w", line) or CHAT.search(line) or about_source(line)
        return meta and not CONTENT.search(line)

    lines = text.strip().splitlines(True)
    kept = [n for n, line in enumerate(lines) if not may_go(line)]
    first, last = (kept[0], kept[-1] + 1) if kept else (0, 0)
    head, answer = "".join(lines[:first]).strip(), "".join(lines[first:last]).strip()
    torn = (head and not ENDED.search(head)) or (last < len(lines) and not ENDED.search(answer))
    chat = kept and (CHAT.search(lines[first]) or CHAT.search(lines[last - 1]))
    return "" if torn or chat or about_source(answer) else answer


# ---------------------------------------------------------------------------------- 3. injection


def gate_opens(group, cfg):
    """γ_fail ≥ ρ, where γ_fail is the share of the group's rewards below δ (reported)."""
    return mean(o.reward < cfg.fail_threshold for o in group) >= cfg.gate_threshold


def replace_worst(group, guide):
    """Puts the guide in the place of the group's lowest reward [reported], in place.

    Ours: of equal rewards the first one goes, and a guide without text, or without a higher reward,
    stays out. The guide need not reach δ. With graded rewards a worse guide would make the failures
    look good. With rewards of 0 and 1, ρ = 1 and β = 0 a failed guide would be one more failure,
    and the group would still teach nothing.
    """
    worst = min(range(len(group)), key=lambda i: group[i].reward)
    if guide.text and guide.reward > group[worst].reward:
        guide.replaced = group[worst]
        group[worst] = guide


# ------------------------------------------------------------------------------------- 4. update


def assign_advantages(groups):
    """Sets A_i of each completion, relative to the rewards of its own group."""
    for group in groups:
        for o, advantage in zip(group, group_advantages([o.reward for o in group])):
            o.advantage = advantage


def group_advantages(rewards):
    """A_i = (R_i - mean R) / (std R + 1e-6) for the rewards of one group, a list of floats.

    The unbiased std and the 1e-6 are ours. `statistics.mean` is exact, so equal rewards give
    exactly 0. A rounding error would count as a signal, and `update` would not skip the group.
    """
    average = statistics.mean(rewards)
    deviation = statistics.stdev(rewards)
    return [(reward - average) / (deviation + 1e-6) for reward in rewards]


def update(model, optimizer, groups, cfg, reference=None):
    """Takes `updates_per_batch` optimizer steps that raise J. Returns metrics.

    If all advantages are 0 and there is no KL term, nothing changes (ours).
    Raises: RepoError if kl_beta lacks a reference, or if sampler and trainer disagree; RuntimeError
    if the gradient is not finite. That optimizer step is not taken then.
    """
    require(
        reference is not None or not cfg.kl_beta,
        f"kl_beta is {cfg.kl_beta} and there is no reference model; pass one",
    )
    if cfg.checkpoint_layers:
        checkpoint_layers(model)
    # With an advantage of 0 and no KL term a completion has no gradient, so it is not read.
    completions = sum(groups, [])
    trained = [o for o in completions if o.advantage != 0 or cfg.kl_beta > 0]
    kls, norms, clipped = [], [], []
    difference = None
    for _ in range(cfg.updates_per_batch if trained else 0):
        optimizer.zero_grad()
        for batch in micro_batches(trained, cfg.micro_batch_tokens):
            batch_logps = token_logps(model, batch, cfg.temperature)
            # In the first update, before any weight moves, these are π_old(·|q) (ours). So the
            # ratio begins at exactly 1. The sampler's own would differ by rounding.
            for o, logps in zip(batch, batch_logps):
                if not o.old_logps:
                    o.old_logps = logps.tolist()
            loss = 0.0
            for o, logps in zip(batch, batch_logps):
                old_logps = logps.new_tensor(o.old_logps)
                o_loss, o_clipped = policy_loss(logps, old_logps, o.advantage, cfg.clip_epsilon)
                loss += o_loss
                clipped += o_clipped.tolist()
            if cfg.kl_beta:
                with torch.no_grad():
                    reference_logps = token_logps(reference, batch, cfg.temperature)
                for logps, reference_o_logps in zip(batch_logps, reference_logps):
                    kl = kl_loss(logps, reference_o_logps)
                    loss += cfg.kl_beta * kl
                    kls.append(kl.item())
            # The divisor counts all completions, also those not read. It is the same for every
            # micro-batch, so the sum of their gradients does not depend on their size.
            (loss / len(completions)).backward()
        difference = check_sampler(trained)
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), cfg.max_grad_norm, error_if_nonfinite=True
        )
        norms.append(norm.item())
        optimizer.step()
        # If the caller runs all this under autocast, its cache holds the old weights in bf16.
        torch.clear_autocast_cache()
    optimizer.zero_grad()  # frees the gradients' memory for the next sampling
    return {
        "kl": mean(kls),
        "grad_norm": mean(norms),  # before scaling
        "clip_ratio": mean(clipped),
        "sampler_logp_diff": difference,
    }


def token_logps(model, completions, temperature):
    """log π_θ(o_t | q, o_<t) at T of each completion's tokens: a list of [|o_i|], fp32, in nats.

    The logits at a token predict the next one. With q = a b and o = c d, those at b and c count.
    Padding stands on the right, after everything that a causal model looks at.
    """
    ids = pad([o.ids for o in completions], "right", model.device)  # [B, L]
    length = ids.shape[1]
    # Logits before the last token of the shortest prompt predict no completion: left uncomputed.
    keep = length - min(len(o.prompt) for o in completions) + 1
    with autocast():
        logits = model(ids, use_cache=False, logits_to_keep=keep).logits  # [B, keep, V]
    left_out = length - logits.shape[1]  # 0 if the model ignores `logits_to_keep`
    logps = []
    for o, row in zip(completions, logits):
        start = len(o.prompt) - 1 - left_out
        scores = row[start : start + len(o.tokens)].float() / temperature  # [|o|, V]
        targets = torch.tensor(o.tokens, device=model.device)
        logps.append(-torch.nn.functional.cross_entropy(scores, targets, reduction="none"))
    return logps


def policy_loss(logps, old_logps, advantage, clip_epsilon):
    """-1/|o| Σ_t min(r_t A, clip(r_t, 1-ε, 1+ε) A) with r_t = π_θ / π_old, both under q (Eq. 11).

    Log-probabilities are [|o|], in nats. Returns (the loss, a scalar; where the clip acts, [|o|]).
    A clipped token has no gradient.
    """
    # The bound (ours) keeps exp finite, because 0 times infinity, the gradient of a clipped token,
    # would be NaN. Its price: a ratio beyond e^60 gives no gradient at all.
    ratio = (logps - old_logps).clamp(max=60.0).exp()
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantage
    return -torch.minimum(unclipped, clipped).mean(), clipped < unclipped


def kl_loss(logps, reference_logps):
    """1/|o| Σ_t (s_t - log s_t - 1), s_t = π_ref / π_θ: the k3 estimate of KL(π_θ ‖ π_ref).

    On tokens drawn from π_θ its mean is that KL, and the mean of its gradient is the gradient of
    KL(π_ref ‖ π_θ). It is taken on o_rep too, which was not drawn so. Log-probabilities are [|o|].
    """
    log_ratio = (reference_logps - logps).clamp(max=60.0)  # as in `policy_loss`
    return (torch.expm1(log_ratio) - log_ratio).mean()


def micro_batches(completions, max_tokens):
    """The completions in batches of at most `max_tokens` tokens with padding, or of one row.

    All but the last have the same number of rows. The longest texts come first, so that a lack of
    memory shows at once.
    """
    completions = sorted(completions, key=lambda o: -len(o.ids))
    longest = max((len(o.ids) for o in completions), default=1)
    return chunks(completions, max(1, max_tokens // longest))


def check_sampler(completions):
    """max |log π of the sampler - log π of the trainer| over the rollouts' tokens, in nats.

    Raises: RepoError if their mean distance is above 0.1 (ours), more than rounding in bf16 gives.
    Causes are a model that ignores padding, or a sampler at another T.
    """
    differences = [
        abs(sampler - trainer)
        for o in completions
        for sampler, trainer in zip(o.sampler_logps, o.old_logps)
    ]
    average = mean(differences) or 0.0
    require(
        average <= 0.1,  # not met by NaN either
        f"sampler and trainer are {average:.2f} nats a token apart: this model ignores positions "
        "or attention masks, or keeps a cache whose rows cannot be rearranged; use another",
    )
    return max(differences, default=None)


def checkpoint_layers(model):
    """Makes the update compute activations twice instead of keeping them.

    In eval mode `activation_checkpointing_enable` alone does nothing: each layer looks at its own
    `training` flag. So this sets the flag of the layers. The modules inside them stay in eval mode,
    without dropout. A layer that drops out by its own flag (OPT's does) fails in `check_sampler`.
    `model.eval()` ends it.
    """
    model.activation_checkpointing_enable()
    for layer in model.modules():
        if hasattr(layer, "gradient_checkpointing"):
            layer.training = True


# -------------------------------------------------------------------------------- what is measured


def trained_guides(guides):
    """Those that are trained. One that stayed out has no advantage, and one of 0 no gradient."""
    return [guide for guide in guides if guide.advantage]


@torch.no_grad()
def measure_experts(model, tokenizer, guides, cfg):
    """log π(·|q) of the tokens of the experts' texts for the injected questions, a flat list."""
    experts = expert_completions(model, tokenizer, trained_guides(guides))
    return [
        logp
        for batch in micro_batches(experts, cfg.micro_batch_tokens)
        for logps in token_logps(model, batch, cfg.temperature)
        for logp in logps.tolist()
    ]


def step_metrics(rollouts, guides, expert_logps, cfg):
    """What a step shows, under TRL's names where it has one. None: there was nothing to measure.

    Reward, entropy and `completions/` are of the rollouts, before injection. The four `logp/` are
    means per token, in nats, on the injected questions, under the policy before the update:

        logp/rollout    the replaced rollouts, after q
        logp/draft      the drafts, after P(q,k)
        logp/rephrase   the rephrases, after q
        logp/expert     the experts' texts, after q

    Where cleaning cut nothing, draft and rephrase are the same tokens. Then logp/draft -
    logp/rephrase is how much the text relies on the hint, if both are at one temperature: greedy
    drafts are measured at T = 1, the others at their own.
    """
    injected = trained_guides(guides)
    rephrases = [o for o in guides if o.draft]
    injected_rephrases = [o for o in injected if o.draft]
    replaced = [o.replaced for o in injected if o.replaced]
    return {
        "reward": mean(o.reward for o in rollouts),
        "entropy": -mean(logp for o in rollouts for logp in o.sampler_logps),  # estimate at T, nats
        "completions/mean_length": mean(len(o.tokens) for o in rollouts),
        "completions/clipped_ratio": mean(o.truncated for o in rollouts),
        "injections": len(injected),
        "rephrase/success": mean(
            o.text != "" and o.reward >= cfg.fail_threshold for o in rephrases
        ),
        "rephrase/clipped_ratio": mean(o.draft.truncated for o in rephrases),
        "logp/rollout": mean(logp for o in replaced for logp in o.sampler_logps),
        "logp/draft": mean(logp for o in injected_rephrases for logp in o.draft.sampler_logps),
        "logp/rephrase": mean(logp for o in injected_rephrases for logp in o.old_logps),
        "logp/expert": mean(expert_logps),
    }


def episode(groups, guides):
    """All that was written on the first question whose gate opened, for a person to read."""
    guide = guides[0]
    [group] = [group for group in groups if group[0].problem is guide.problem]
    rollouts = [o.replaced or o for o in group]  # as they were before the injection
    return guide.problem | {
        "rollouts": [dict(reward=o.reward, text=o.text) for o in rollouts],
        "draft": guide.draft and guide.draft.text,
        "guide": guide.text,
        "reward": guide.reward,
        "injected": bool(guide.advantage),
    }


def accuracy(model, tokenizer, problems, cfg, reward_fn):
    """The share of problems, 0 to 1, whose greedy completion does not fail; None without any."""
    model.eval()
    parts = chunks(problems, cfg.batch_size * cfg.group_size)
    return mean(
        o.reward >= cfg.fail_threshold
        for part in tqdm(parts, "accuracy", leave=False, disable=None)
        for [o] in rollout(model, tokenizer, part, 1, 0.0, cfg, reward_fn)
    )


# ---------------------------------------------------------- here the paper ends. Prompts in tokens


def fill(template, problem):
    """The template with {question} and {knowledge} filled in; other braces stay as they are."""
    return re.sub(r"\{(question|knowledge)\}", lambda slot: problem[slot[1]], template)


PROMPT_OPTIONS = dict(
    add_generation_prompt=True,
    enable_thinking=False,
    date_string="1 Jan 2026",  # Llama's template writes today's, and a resumed run would differ
)


def encode_prompt(tokenizer, text):
    """Token ids of the user's turn `text`, up to where the answer begins.

    Control tokens that the text spells out stay text. The library does not manage all of them, so
    `fitting` leaves out problems that spell one.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            turns, sanitize_control_tokens=True, **PROMPT_OPTIONS
        ).input_ids
    # A base model. After a line break its answer begins without a blank.
    ids = tokenizer(text + "\n\nSolution:\n", split_special_tokens=True).input_ids
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # some append an EOS


def encode_answer(tokenizer, text, first):
    """Token ids of `text` in the place of an answer that the policy began with the token `first`.

    The first token must be one that the policy writes there. Behind a prompt that ends in
    "Assistant:" it writes " It", elsewhere "It". And some tokenizers put a blank before any text.
    So the text is encoded behind a line break, which is dropped, and with a blank if `first` begins
    with one.
    Raises: RepoError if the tokenizer joins line break and text.
    """
    blank = (tokenizer.convert_ids_to_tokens(first) or "").startswith((" ", "▁", "Ġ"))
    options = dict(add_special_tokens=False, split_special_tokens=True)
    line_break = tokenizer("\n", **options).input_ids
    ids = tokenizer(f"\n {text}" if blank else f"\n{text}", **options).input_ids
    start = len(line_break)
    require(ids[:start] == line_break, "the tokenizer joins line breaks and text; use another")
    return ids[start:]


def end_tokens(model, tokenizer):
    """The ids that end an answer; the first one closes an expert's text.

    That is the first control token that the chat template writes after an answer. It need not be
    the EOS: Gemma's template writes <end_of_turn>, Phi's <|end|>.
    Raises: RepoError if there is none, or if `after_answer` refuses the template.
    """
    ends = []
    if tokenizer.chat_template:
        control = control_tokens(tokenizer)
        after = tokenizer(after_answer(tokenizer), add_special_tokens=False).input_ids
        ends = [i for i in after if i in control][:1]
    configured = model.generation_config.eos_token_id  # an id, several or None
    ends += [tokenizer.eos_token_id]
    ends += configured if isinstance(configured, list) else [configured]
    ends = [i for i in ends if i is not None]
    require(ends, "no token ends an answer; set the tokenizer's eos_token")
    return ends


def after_answer(tokenizer):
    """What the chat template writes after an answer within a conversation.

    Raises: RepoError unless an answer follows directly on what a prompt ends in, as a rollout does.
    Otherwise the rephrase would be trained in another place.
    """
    question, answer = "What is 4142?", "It is 4242."  # a template hardly contains these
    user = {"role": "user", "content": question}
    turns = [user, {"role": "assistant", "content": answer}, user]
    with explaining("the chat template refuses a plain conversation", "use another model"):
        prompt, talk = (
            tokenizer.apply_chat_template(said, tokenize=False, **PROMPT_OPTIONS)
            for said in (turns[:1], turns)
        )
    header, shown, after = talk.partition(answer)
    thoughts = re.search(r"<[^<>/]*(think|reason)[^<>/]*>\s*$", prompt)
    follows = shown and prompt.startswith(header.rstrip())
    require(
        question in prompt and follows and not thoughts,
        "the chat template drops what is said, has no generation prompt, answers in channels, or "
        "opens a block of thoughts even with enable_thinking=False; use another model",
    )
    return after


def control_tokens(tokenizer):
    """{id: text} of the tokens with a meaning of their own, like <|im_end|> and <think>."""
    return {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and (token.special or token.content.startswith("<"))
    }


# --------------------------------------------------------- the words that cleaning looks for (ours)


def any_of(phrases):
    """A pattern for any of the phrases."""
    return "|".join(map(re.escape, phrases.split(", ")))


CONTROL = re.compile(r"</?think|<[|｜]|</?s>|<(?:start|end)_of_turn>|\[/?INST\]")
# A digit, a sign of mathematics, a letter as in "option B" or "angle X".
CONTENT = re.compile(r"[^a-zA-Z\s.,:;!?'’\"“”()*_#-]|\b[B-HJ-Z]\b")
ENDED = re.compile(r"[.!?:)}\]$*_`|\"”-]$")  # a sentence, heading, formula or line of a table

CHAT_STARTS = any_of(
    "sure, certainly, absolutely, definitely, of course, yes, okay, ok, alright, no problem, "
    "understood, got it, hello, thank you, thanks, you're welcome, good luck, here is, here are, "
    "here's, here’s, here you go, below is, below are, let me explain, let me walk"
)
CHAT_PHRASES = any_of(
    "great question, happy to, hope this, hope that helps, hope that answers, hope it helps, "
    "hope you, let me know, feel free to, would you like, anything else I can, if you have any, "
    "any questions, if you need more, if you need further, make sense?"
)
CHAT = re.compile(rf"(?i)^[\W_]*(?:{CHAT_STARTS})\b|\b(?:{CHAT_PHRASES})")

SOURCE_WORDS = any_of(
    "notes, the note, hint, hints, reference, references, own words, my words, different words, "
    "simpler words, simpler terms, your, answer key, answer above, answer provided, "
    "answer is given, expected answer, given answer is, original answer, rewritten answer, "
    "rewritten version, information provided, steps provided, steps above, given steps, "
    "provided information, provided calculation, provided text, provided answer, rewrite this, "
    "the source, the text, the passage, the prompt, the user, as requested, as instructed, "
    "as asked, you've"
)
SOURCE_STEMS = any_of("rephras, re-phras, reword, re-word, paraphras, expert")
YOU_DID = any_of(
    "provided, gave, given, mentioned, noted, shared, stated, wrote, explained, said, told, "
    "showed, described, suggested, listed, outlined, used"
)
# "Solution" alone is a word of mathematics. The words around it show that a text is meant.
BEFORE = any_of(
    "given, provided, above, original, sample, model, official, suggested, rewritten, this, "
    "to the, on the, as the, in the, from the, per the, by the, with the, follow the, "
    "following the, follows the, match the, matches the, using the, verify the, through the, "
    "like the"
)
SOURCE = re.compile(
    rf"(?i)\b(?:({SOURCE_WORDS}|you (?:\w+ )?(?:{YOU_DID}))\b|({SOURCE_STEMS})"
    rf"|(?:{BEFORE}) (?:[\w-]+,? ){{0,2}}(solution|explanation)s?\b"
    r"|the (solution|explanation)s?"
    r" (?!(?:is|are|to|of|set|for|in|has)\b)[a-z])"
)


# ------------------------------------------------------------------ a reward for mathematics (ours)
#
# test_repo.py has a table of answers that it takes and of answers that it does not take.

REWRITES = (  # pattern and replacement, in this order: typography, signs, the form of a choice
    ("[−–]", "-"),  # −5 is -5
    # 1{,}000 is 1,000. The sign between is not the comma: (1{,}000) is a number, (1,000) a pair.
    (r"(?<=[0-9])(?:\{,\}|\\,|,?\\!)(?=[0-9]{3})", "\u066c"),
    # \left( is (, and \quad is a blank.
    (r"\\(?:left|right)(?![a-zA-Z])\.?|\\(?:displaystyle|q?quad)(?![a-zA-Z])", " "),
    (r"(?<!\\)\\[,;:!$ ]|[$\s]", " "),  # \, is a blank, and $5 is 5
    (r"(?<=[0-9]) ?(?:\\?%|°|\^ ?(?:\\circ|\{\\circ\}))(?! ?\w)", " "),  # 5% is 5, and 90° is 90
    # \text{B} is B, but x_\text{max} stays.
    (r"(?<![\^_a-z])\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}", r" \1 "),
    (r"(?<!\\)\\([#_&])", r"\1"),  # C\# is C#
    (r"\\[dt]frac", r"\\frac"),  # \dfrac is \frac
    (r"\\(frac|sqrt)(?![a-zA-Z]) ?(\w)", r"\\\1{\2}"),  # \sqrt34 is \sqrt{3}4
    (r"(\\frac\{[^{}]*\}) ?(\w)", r"\1{\2}"),  # \frac{3}4 is \frac{3}{4}
    (r"([_^])\{(\w)\}", r"\1\2"),  # x^{2} is x^2, but x^{12} is not x^12
    (r" +", " "),  # one blank
    (r" - |(?<![\w)}])- ", "-"),  # x - 1 is x-1, but 5 -3 are two numbers
    (r" ?(\\[a-zA-Z]+(?= [^a-zA-Z])|[^\w ,.-]) ?", r"\1"),  # a + b is a+b
    (r"\.$|^.*=$", ""),  # 5. is 5, and x= says nothing
    (r"^\(?([A-J])\)?$", r"\1"),  # (B) is B
    (r"^(-?)\\frac\{(-?[0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3"),  # \frac{3}{4} is 3/4
)
# 12, 1,200, 1.5, .5 or 3/4, but not 1,20.
NUMBER = r"[+-]?(?:(?:[1-9][0-9]{0,2}(?:[,\u066c][0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER += r"|[0-9]+/0*[1-9][0-9]*)"


def last_boxed(text):
    r"""What the last `\boxed{...}` holds, inner braces included; "" if none or never closed."""
    *before, tail = re.split(r"\\boxed\s*", text)
    depth = 0
    for i, char in enumerate(tail if before else ""):
        depth += (char == "{") - (char == "}")
        if depth <= 0:  # the box is closed, or no brace has opened it
            return tail[1:i]
    return ""


def normalise(answer):
    """The answer as an exact number, or else as a text without typography. Evaluates nothing."""
    for pattern, replacement in REWRITES:
        answer = re.sub(pattern, replacement, answer).strip()
    if len(answer) < 1000 and re.fullmatch(NUMBER, answer):  # int() refuses very long numbers
        return Fraction(re.sub("[,\u066c]", "", answer))
    return re.sub(" ?, ?", ",", answer)


def boxed_reward(completion, answer):
    r"""1.0 if the last `\boxed{...}` is the answer, the same number or the same text, else 0.0.

    Takes any string. The signs $, % and ° do not count. A unit, `x=` or another order of terms
    makes another text. In doubt it says 0.0, because a false 1.0 teaches a mistake. A false 0.0
    does harm too: it pushes a right answer down, or opens a gate.
    """
    gold = normalise(answer)
    return float(gold != "" and normalise(last_boxed(completion)) == gold)


# ------------------------------------------------ the command line: data, model, checkpoint, run


@dataclass(frozen=True)
class Run:
    """Model, data and output."""

    model: str = option(MISSING, "hub name or folder of a causal language model")
    dataset: str = option(MISSING, "hub name, or a .json, .jsonl or .parquet file")
    out: str = option(MISSING, "folder for metrics, episodes, checkpoint and model")
    subset: str | None = option(None, "configuration of the dataset, if it has several")
    split: str = option("train", "split to train on, also a slice: train[:1000]")
    eval_split: str | None = option(None, "split for the accuracy before and after training")
    question_column: str = option("question", "the question")
    knowledge_column: str = option("answer", "the expert's solution")
    answer_column: str = option("answer", "bare, boxed or after ####")
    steps: int = option(100, "steps of training, those done before included")
    save_every: int = option(50, "steps between checkpoints; 0: only at the end")
    resume: bool = option(False, "go on from the checkpoint in --out")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where it runs")


def in_box(text):
    r"""GSM8K's last line `#### 42` as "The final answer is \boxed{42}.", without its <<6*7=42>>.

    Any other text stays as it is.
    """
    mark = re.fullmatch(r"(?s)(?!.*\\boxed)((?:.*\n)?)#### *([^#\s][^\n]*)", text)
    if not mark:
        return text
    solution = re.sub(r"<<[-+*/%().,\d ]+=[-.,\d]+>>(?=[-.\d])", "", mark[1])
    return f"{solution}The final answer is \\boxed{{{mark[2]}}}."


def as_text(cell):
    """A cell as text, "" if empty; of a chat its only turn besides the system's.

    An expert's thoughts go, up to </think>.
    """
    if isinstance(cell, list):
        turns = [turn["content"] for turn in cell if turn["role"] != "system"]
        cell = turns[0] if len(turns) == 1 else None
    return "" if cell is None else str(cell).rpartition("</think>")[2].strip()


# Column types that keep the spelling of the file.
READABLE = [Value(name) for name in ("string", "large_string", "int32", "int64", "uint64")]
READABLE += [List({"role": string, "content": string}) for string in READABLE[:2]]  # chats


def load_problems(run, split, guided=True):
    r"""The split as a list of dicts of question, knowledge and answer, all of them text.

    The answer is the last `\boxed{}` of its column, or else all its text. A record that lacks one
    of the three is left out, and so is one whose answer is the whole solution. Without `guided`
    no knowledge is needed. The fields of a dict are columns: reward_model.ground_truth.
    Raises: RepoError if a column is missing, or if no record is left. Also for another type than
    text, integers or chats: in a column of floats 42 has become 42.0.
    """
    readers = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    reader = readers.get(Path(run.dataset).suffix)  # None: a dataset of the hub
    require(
        reader or not Path(run.dataset).exists(),
        f"{run.dataset!r} must be a .json, .jsonl or .parquet file. A CSV file has no types. This "
        'converts it: python -c "import csv, datasets; datasets.Dataset.from_list(list('
        "csv.DictReader(open('x.csv', encoding='utf-8-sig'), delimiter=','))"
        ").to_parquet('x.parquet')\"",
    )
    options = {}
    if reader:  # read anew each time, because the library's copy may be older than the file
        options = dict(data_files=glob.escape(run.dataset), download_mode="force_redownload")
    columns = [run.question_column, run.answer_column, run.knowledge_column]
    with explaining(
        f"{run.dataset!r} has no readable split {split!r}",
        "a file must be UTF-8 and not empty; its only split is train, or a part of it, train[:200]",
    ):
        data = load_dataset(reader or run.dataset, run.subset, split=split, **options).flatten()
        present = [column for column in columns if column in data.features]
        records = data.select_columns(present).to_list()
    for column in columns if guided else columns[:2]:
        # If a dict could not be read as fields, its own type is shown.
        kind = data.features.get(column, data.features.get(column.partition(".")[0]))
        require(kind, f"{run.dataset!r} has no column {column!r}, only {list(data.features)}")
        require(
            column in present and kind in READABLE,
            f'column {column!r} of {run.dataset!r} is {kind}; write text ("19.8", not 19.8) or '
            "integers, with the same keys and types in each record, or parquet",
        )
    problems = []
    for record in records:
        question, answer, knowledge = (as_text(record.get(column)) for column in columns)
        answer = last_boxed(in_box(answer)) or answer
        solved = knowledge not in ("", answer) and "<think>" not in knowledge
        if question and answer and (solved or not guided):
            problems.append(dict(question=question, knowledge=in_box(knowledge), answer=answer))
    summary = f"{len(problems)} of {len(data)} records have question, solution and answer"
    print(summary)
    require(problems, f"{summary}; a solution needs its answer in a box or in a last line #### 42")
    return problems


def load_model(name, device):
    """(model with fp32 weights, tokenizer). No code of the checkpoint is run.

    Raises: RepoError if they cannot be loaded or trained, are not whole or do not fit each other.
    """
    with explaining(
        f"{name!r} cannot be loaded as a causal language model",
        "give a hub name, or a folder that save_pretrained has written",
    ):
        config = AutoConfig.from_pretrained(name)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype="float32", use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    missing = sorted(loaded["missing_keys"])  # they would be random
    require(not missing, f"{name!r} lacks weights, {missing[:1]}; save the whole language model")
    quantised = hasattr(config, "quantization_config")
    require(
        not quantised and all(weight.requires_grad for weight in model.parameters()),
        f"{name!r} has weights that take no gradient (quantised, or an adapter); give full weights",
    )
    rows = model.get_input_embeddings().num_embeddings
    require(
        max(tokenizer.get_vocab().values()) < rows,
        f"{name!r} has a tokenizer of more tokens than its {rows} embeddings",
    )
    end_tokens(model, tokenizer)  # raises for a chat template that cannot work
    if config.model_type != model.config.model_type:
        print(f"of {name} only the language model is trained and saved, {model.config.model_type}")
    if hasattr(model.config, "output_router_logits"):
        # A mixture of experts would add a loss of its own, which fails with a cache.
        model.config.output_router_logits = False
    return model.to(device), tokenizer


def fitting(problems, model, tokenizer, cfg):
    """The problems whose q and P(q,k) leave room for a completion and spell no control token.

    Prints how many are kept, if not all. With --guidance none P(q,k) counts too, so that such a run
    trains on the same problems.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", math.inf)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this, positions depend on the whole batch
        context = rope["original_max_position_embeddings"]
    control = control_tokens(tokenizer).values()
    kept = []
    for problem in tqdm(problems, "prompt lengths", leave=False, disable=None):
        texts = [fill(template, problem) for template in (cfg.question_prompt, cfg.rephrase_prompt)]
        longest = max(len(encode_prompt(tokenizer, text)) for text in texts)
        spelled = any(token in text for text in texts for token in control)
        if longest + cfg.max_new_tokens <= context and not spelled:
            kept.append(problem)
    if len(kept) < len(problems):
        print(
            f"{len(kept)} of {len(problems)} problems fit: they leave {cfg.max_new_tokens} of "
            f"{context} tokens and spell no control token"
        )
    return kept


def draw_batch(problems, step, cfg):
    """The problems of a step, drawn from all of them by seed and step alone; no epochs (ours)."""
    generator = random.Random(f"{cfg.seed} {step}")
    return generator.sample(problems, min(cfg.batch_size, len(problems)))


MAY_CHANGE = "out steps save_every resume device micro_batch_tokens checkpoint_layers".split()


def append(log, record):
    """Adds a line of JSON to the file."""
    with log.open("a") as file:
        file.write(json.dumps(record) + "\n")


def train(run, cfg, reward_fn):
    """The run of the command line. What can be checked without the model is checked first.

    Raises: RepoError for whatever cannot work.
    """
    out = Path(run.out)
    checkpoint = out / "checkpoint.pt"
    logs = out / "metrics.jsonl", out / "episodes.jsonl"
    with explaining("--out or --device cannot be used", "choose another"):
        torch.empty(0, device=run.device)
        for log in logs:
            log.touch()
    begun = checkpoint.exists() or logs[0].stat().st_size > 0
    require(begun or not run.resume, f"{out} holds no run to resume; check --out")
    require(run.resume or not begun, f"{out} holds a run; add --resume or choose another --out")

    guided = cfg.guidance != "none"
    problems = load_problems(run, run.split, guided)
    held_out = load_problems(run, run.eval_split, guided) if run.eval_split else []
    # The reward is tried on the experts' texts. One that takes none of them is seen at once.
    experts = [Completion(problem, [], [], problem["knowledge"]) for problem in problems]
    assign_rewards(experts, reward_fn)
    failed = [o for o in experts if o.reward < cfg.fail_threshold]
    taken = len(experts) - len(failed)
    print(f"the reward takes {taken} of {len(experts)} experts' texts")
    for o in failed[:1]:
        print(f"it does not take, for {o.problem['answer']!r}, the text that ends {o.text[-80:]!r}")
        print("the default reward reads the last \\boxed{} only")
    require(taken or cfg.guidance != "verbatim", "the reward takes no expert's text to be injected")

    settings = vars(run) | vars(cfg)
    settings["data or reward"] = zlib.crc32(repr(experts).encode())  # of records and their rewards
    state = dict(step=0, log_sizes=(0, 0), settings=settings)
    if checkpoint.exists():
        with explaining(f"{checkpoint} cannot be read", "choose another --out"):
            state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    for name, value in settings.items():
        was = state["settings"].get(name)
        require(
            name in MAY_CHANGE or value == was,
            f"{out} was begun with {name} = {was!r}, now it is {value!r}; change it back or choose "
            "another --out",
        )
    done = state["step"]
    require(run.steps > 0 and run.steps >= done, f"--steps is {run.steps}, and {done} are done")

    model, tokenizer = load_model(run.model, run.device)
    # The reference and the first accuracy are those of --model, also when a run is resumed.
    reference = copy.deepcopy(model) if cfg.kl_beta else None
    problems = fitting(problems, model, tokenizer, cfg)
    held_out = fitting(held_out, model, tokenizer, cfg)
    require(problems, "no problem fits; lower --max-new-tokens")
    prompt = encode_prompt(tokenizer, fill(cfg.question_prompt, problems[0]))
    print(f"training on {run.device}; the first prompt:\n{tokenizer.decode(prompt)}")
    if held_out:
        print(f"answering {len(held_out)} held-out problems, as again after training")
    before = accuracy(model, tokenizer, held_out, cfg, reward_fn)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.learning_rate, weight_decay=0.0, fused=True
    )
    if done:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for log, size in zip(logs, state["log_sizes"]):
        os.truncate(log, size)  # a killed run may have logged more than its checkpoint has done

    for step in tqdm(range(done, run.steps), disable=None):
        # What is random depends on seed and step alone. So a resumed run equals one that was never
        # stopped, on the same device with the same micro-batches.
        batch = draw_batch(problems, step, cfg)
        torch.manual_seed(1_000_000 * cfg.seed + step)
        start = time.perf_counter()
        metrics, groups, guides = train_step(
            model, tokenizer, optimizer, batch, cfg, reward_fn, reference
        )
        seconds = time.perf_counter() - start
        append(logs[0], {"step": step, "seconds": seconds, **metrics})
        if guides:
            append(logs[1], {"step": step, **episode(groups, guides)})
        tqdm.write(
            f"step {step}: reward {metrics['reward']:.2f}, injections {metrics['injections']}, "
            f"truncated {metrics['completions/clipped_ratio']:.0%}, {seconds:.1f} s"
        )
        if step + 1 == run.steps or (run.save_every and (step + 1) % run.save_every == 0):
            state = dict(
                step=step + 1,
                log_sizes=[log.stat().st_size for log in logs],
                settings=settings,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
            )
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)  # a kill leaves the old file or the new one

    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    after = accuracy(model, tokenizer, held_out, cfg, reward_fn)
    summary = json.dumps(dict(accuracy_before=before, accuracy_after=after))
    (out / "summary.json").write_text(summary)
    print(summary)


def main(argv=None, reward_fn=boxed_reward):
    """Parses the flags and trains. A RepoError ends in its message alone."""
    parser = HfArgumentParser([Run, Config], description=__doc__.partition("\n")[0])
    flags = parser.parse_args(argv)  # ends with a usage line at an unknown flag
    try:
        run, cfg = parser.parse_dict(vars(flags))
        with explaining("--out cannot be used", "choose another"):
            Path(run.out).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(run.out) / ".lock", blocking=False):  # free when the process ends
            train(run, cfg, reward_fn)
    except RepoError as error:
        sys.exit(f"error: {error}")
    except Timeout:
        sys.exit(
            f"error: another process trains into {run.out}; choose another --out. For one run in "
            "several processes see the README's recipe for TRL"
        )
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"error: {error}; sampling needs less with a lower --batch-size, --group-size or "
            "--max-new-tokens, the update with --checkpoint-layers or a lower --micro-batch-tokens"
        )
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on from the last checkpoint, if there is one")


if __name__ == "__main__":
    main()
