r"""RePO: Rephrasing Policy Optimization (arXiv 2602.10819), a reference implementation in one file.

The policy π_θ is a language model, and π_old is π_θ as the step finds it. A question q comes with
an expert's solution k (the knowledge) and an answer that can be checked. Where all rollouts of a
question fail alike, advantages are 0 and GRPO learns nothing. RePO shows k to the policy, lets it
write the solution in its own words and trains that text as if the policy had found it alone.
One step is `train_step`, after the settings:

    1. Rollout     o_1..o_G ~ π_old(·|q), with rewards R_1..R_G
    2. Rephrase    o_rep ~ π_old(·|P(q,k)); the prompt P asks to understand k, then       (Eq. 5)
                   to write it anew; by default greedily (ours), and cleaned of meta text
    3. Injection   if γ_fail = 1/G Σ_i 1[R_i < δ] ≥ ρ, o_rep replaces the worst rollout,
                   provided that it earns more than that one (ours)
    4. Update      A_i = (R_i - mean R) / std R
                   r_i,t = π_θ(o_i,t | q, o_i,<t) / π_old(o_i,t | q, o_i,<t)             (Eq. 11)
                   J = 1/G Σ_i 1/|o_i| Σ_t min(r_i,t A_i, clip(r_i,t, 1-ε, 1+ε) A_i)
                   averaged over the questions, and less β KL where it is asked for;
                   o_rep stands under the plain q here, so that no hint is left. As it was drawn
                   under P(q,k), "on-policy", the paper's word, is not literally true

With rewards of 0 and 1, ρ = 1, β = 0 and one update a batch this becomes simple: every ratio is 1,
the clip never acts, and in an injected group o_rep has the advantage (G-1)/√G and each failure
-1/√G (G = 8: 2.47 and -0.35; by the unbiased std). There a step is supervised learning on one
verified text of the policy's own, and a push away from G-1 failures. Its kin:

    GRPO                   nothing is injected (--guidance none)
    STaR, 2203.14465       a verified text of its own, supervised, without group and failures
    context distillation   what stood in the prompt moves into the weights (2209.15189)
    LUFFY, 2504.14945      the expert's own text in the group, its ratios shaped
    Guide, 2506.13923      hints where all rollouts fail, the ratio corrected for the hint

Sources: we have not read the full text of the paper, and no code of its authors is public. A mark
says where a mechanism or a value comes from: `paper` is the abstract, `reported` what independent
readers of the full text say (equation numbers too), `ours` our choice where we know of none.

    python repo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k --subset main --out out
"""

import copy
import glob
import inspect
import json
import math
import numbers
import random
import re
import statistics
import sys
import time
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from datasets import load_dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser


class RepoError(ValueError):
    """Something given cannot work; the message names it and says what to do."""


# ------------------------------------------------------------------------------------- settings

QUESTION_PROMPT = "{question}\n\nReason step by step and put the final answer in \\boxed{}."

REPHRASE_PROMPT = """{question}

Your notes for the answer:
{knowledge}

Understand them. Then write the full answer from them in your own words: explain every step, with \
its calculation and its result. End with: The final answer is \\boxed{...}"""


@dataclass(frozen=True)
class Config:
    """The settings of the algorithm. In brackets: whose the mechanism is, and whose the default;
    "none reported" where the paper must have a value and its readers do not name it.
    """

    group_size: int = 8
    """G, rollouts of a question [reported, reported]"""
    batch_size: int = 16
    """questions in a step [reported, ours; 512 is reported]"""
    max_new_tokens: int = 512
    """longest completion in tokens [ours, ours: none reported]"""
    temperature: float = 1.0
    """T: policy softmax(logits / T) [ours, ours: none reported]"""
    rephrase_temperature: float = 0.0
    """T of o_rep; 0 is greedy, which gives sounder texts [ours, ours: none reported]"""
    guidance: str = "rephrase"
    """what an open gate lets in: rephrase [paper, paper]; for comparison verbatim, the expert's own
    text, or none, which is GRPO [ours]"""
    fail_threshold: float = 0.5
    """delta: a reward below it is a failure; above 0, at most 1 [reported, ours: none reported]"""
    gate_threshold: float = 1.0
    """rho: share of failures that opens the gate [reported, ours: none reported]"""
    clip_epsilon: float = 0.2
    """epsilon: ratios are clipped to 1 ± epsilon [reported, ours: none reported]"""
    kl_beta: float = 0.0
    """beta, weight of the KL term; 0 needs no reference [reported, ours: none reported]"""
    updates_per_batch: int = 1
    """optimizer steps on a batch [ours, ours: none reported]"""
    learning_rate: float = 1e-6
    """of AdamW, constant, no weight decay [ours, reported]"""
    max_grad_norm: float = 1.0
    """a longer gradient is scaled down to this [ours, ours]"""
    micro_batch_tokens: int = 4096
    """tokens, padding included, in one pass of the update; changes speed and memory, not the
    gradient. Memory: 16 bytes a weight (20 with beta), and for each of these tokens about 3.4 MB
    with 0.5 B weights, 5.2 with 1.5 B, 8.9 with 4 B [ours, ours]"""
    question_prompt: str = QUESTION_PROMPT
    """q as a user's turn [ours, ours]"""
    rephrase_prompt: str = REPHRASE_PROMPT
    """P(q,k) as a user's turn [paper, ours]"""
    seed: int = 0
    """of the sampling and of the batches [ours, ours]"""

    def __post_init__(self):
        """Raises: RepoError for a value that cannot be meant."""
        rules = {  # "field: what is demanded of it"
            "group_size: at least 2, or there is nothing to compare": self.group_size >= 2,
            "batch_size: at least 1": self.batch_size >= 1,
            "max_new_tokens: at least 1": self.max_new_tokens >= 1,
            "updates_per_batch: at least 1": self.updates_per_batch >= 1,
            "temperature: above 0": self.temperature > 0,
            "rephrase_temperature: at least 0": self.rephrase_temperature >= 0,
            "guidance: rephrase, verbatim or none": (
                self.guidance in ("rephrase", "verbatim", "none")
            ),
            "fail_threshold: above 0 and at most 1": 0 < self.fail_threshold <= 1,
            "gate_threshold: a share of the group, 0 to 1": 0 <= self.gate_threshold <= 1,
            "clip_epsilon: at least 0": self.clip_epsilon >= 0,
            "kl_beta: at least 0, or the policy would flee its reference": self.kl_beta >= 0,
            "learning_rate: above 0": self.learning_rate > 0,
            "max_grad_norm: above 0": self.max_grad_norm > 0,
            "question_prompt: a text with {question}, and without the hint": (
                "{question}" in self.question_prompt and "{knowledge}" not in self.question_prompt
            ),
            "rephrase_prompt: a text with {knowledge}": "{knowledge}" in self.rephrase_prompt,
        }
        for rule, holds in rules.items():
            if not holds:
                name, _, demand = rule.partition(": ")
                raise RepoError(f"{name} is {getattr(self, name)!r}; it must be {demand}")


@dataclass
class Completion:
    """One text that answers a question: a rollout, a draft, a rephrase or the expert's own."""

    problem: dict  # its question, knowledge and answer
    prompt: list  # token ids of the plain q; of P(q,k) in a draft, which is never trained
    tokens: list  # token ids, with the end token, which is trained too
    text: str  # the tokens as the reward reads them
    truncated: bool = False  # max_new_tokens came before an end token; trained as any other
    sampler_logps: list = ()  # log π of each token as it was drawn, in nats; never in the loss
    old_logps: list = ()  # log π_old(·|q) by the update's first pass: the ratio's denominator
    reward: float = 0.0
    advantage: float = math.nan  # until its group has been compared
    draft: str = ""  # of o_rep: what the policy wrote, before cleaning
    replaced: "Completion | None" = None  # of a text let in: the rollout whose place it took

    @property
    def ids(self):
        """Prompt and completion, as the model reads them in the update."""
        return self.prompt + self.tokens


# ---------------------------------------------------------------------------- the algorithm box


def train_step(model, tokenizer, optimizer, problems, cfg, reward_fn, reference=None):
    """One step of RePO on `problems`, dicts of question, knowledge and answer. Trains in place.

    `reward_fn(text, answer)` gives a number, with δ between wrong and right; `reference` is the
    π_ref of the KL term, in eval mode. Returns (metrics, the groups as trained, the guides: the
    texts that were offered to open gates, each an o_rep, or with --guidance verbatim the expert's
    text).
    """
    model.eval()  # with dropout the trained policy would not be the one that was sampled

    # 1. Rollout: o_1..o_G ~ π_old(·|q), each with its reward.
    groups = rollout(model, tokenizer, problems, cfg.group_size, cfg.temperature, cfg, reward_fn)

    # 2. Rephrase: o_rep ~ π_old(·|P(q,k)). The gate belongs to step 3, but is asked here (ours):
    #    where it is closed, o_rep need not be written.
    hard = [group for group in groups if gate_opens(group, cfg)]
    guides = write_guides(model, tokenizer, [group[0].problem for group in hard], cfg, reward_fn)

    # 3. Injection: o_rep takes the place of the worst rollout. `groups` sees it too, as the groups
    #    of `hard` are the same lists.
    for group, guide in zip(hard, guides):  # no guides with --guidance none
        replace_worst(group, guide)

    # 4. Update: group-relative advantages, then the clipped policy gradient under the plain q.
    assign_advantages(groups)
    updated = update(model, optimizer, groups, cfg, reference)

    metrics = step_metrics(model, tokenizer, hard, groups, guides, cfg) | updated
    return metrics, groups, guides


# --------------------------------------------------------------------- three helpers throughout

SECONDS = {}  # how long the last call of each function that is `timed` took, for `step_metrics`


@contextmanager
def timed(metric):
    """A decorator: SECONDS[metric] is how long the function's last call took."""
    start = time.perf_counter()
    yield
    SECONDS[metric] = time.perf_counter() - start


def mean(values):
    """The mean, or None (null in metrics.jsonl) where there was nothing to measure."""
    values = list(values)
    return sum(values) / len(values) if values else None


def chunks(items, size):
    """The items in lists of `size`; the last one may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


# ------------------------------------------------------------------------------------ 1. rollout


@timed("seconds/sample")
def rollout(model, tokenizer, problems, num_samples, temperature, cfg, reward_fn):
    """Step 1: o_1..o_G ~ π_old(·|q) with their rewards: a list of completions for each problem.

    Their number and temperature are arguments, as `accuracy` asks for one greedy sample.
    Raises: RepoError if most begin with thoughts. A rephrase has none, and training on rephrases
    would teach the model to skip them (ours).
    """
    groups = complete(
        model, tokenizer, cfg.question_prompt, problems, num_samples, temperature, cfg
    )
    rollouts = sum(groups, [])
    score(rollouts, reward_fn)
    if mean("<think" in tokenizer.decode(o.tokens[:8]) for o in rollouts) > 0.5:
        raise RepoError(
            "the model thinks before it answers (<think>), a rephrase does not; use a "
            "model or a chat template that answers without thoughts"
        )
    return groups


def score(completions, reward_fn):
    """Sets their rewards R(o) = `reward_fn(text, answer)`: the one place where this is done.

    Raises: RepoError with question and text if one is not a finite number.
    """
    for o in completions:
        reward = reward_fn(o.text, o.problem["answer"])
        if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
            raise RepoError(
                f"the reward function must return a finite number, and returned {reward!r}"
                f"\nquestion: {o.problem['question']}\ncompletion: {o.text}"
            )
        o.reward = float(reward)


def complete(model, tokenizer, template, problems, num_samples, temperature, cfg):
    """`num_samples` answers to each problem in the template, a list each, not yet rewarded.

    How a text becomes a prompt in tokens, and which tokens end an answer, stands below, where the
    paper ends.
    """
    prompts = [encode_prompt(tokenizer, fill(template, problem)) for problem in problems]
    ends = end_tokens(model, tokenizer)
    drawn = sample(model, prompts, num_samples, cfg.max_new_tokens, temperature, ends)
    completions = []
    for i, (ids, logps) in enumerate(drawn):
        n = i // num_samples
        text = tokenizer.decode(ids, skip_special_tokens=True)
        truncated = ids[-1] not in ends
        completions.append(Completion(problems[n], prompts[n], ids, text, truncated, logps))
    return chunks(completions, num_samples)


@torch.no_grad()
def sample(model, prompts, num_samples, max_new_tokens, temperature, ends):
    """Draws `num_samples` completions of each prompt from exactly softmax(logits / T).

    `prompts` are lists of token ids. Returns (token ids, log-probability of each) for each
    completion, those of a prompt side by side. A completion ends with its first token in `ends`, or
    after `max_new_tokens` without one. T = 0 is greedy, with log-probabilities of T = 1.

    A loop of our own: `model.generate` follows the checkpoint's top-k, top-p and penalties, and
    takes longer.
    """
    inputs = pad(prompts, "left", model.device)  # [B, P]
    mask = pad([[1] * len(prompt) for prompt in prompts], "left", model.device)  # [B, P]
    positions = mask.cumsum(1) - mask  # of a real token: as many as stand before it
    cache = None
    # source[i] is the row of a pass that text i is written on from; the pass over, the rows of
    # logits, mask and cache are put in this order. Two prompts of three samples each:
    #     0 0 0 1 1 1    after the first pass: the samples of a prompt share its row
    #     0 2 3 4 5      one pass after text 1 has ended: its row, computed once more, is dropped
    source = [n for n in range(len(prompts)) for _ in range(num_samples)]
    completions = [([], []) for _ in source]  # token ids, log π
    texts = completions  # those that are still being written

    with autocast():
        for _ in range(max_new_tokens):
            output = model(
                inputs,
                attention_mask=mask,
                position_ids=positions,
                cache=cache,  # past_key_values before transformers 5.24
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1].float()  # [B, V] at first, then [texts, V]
            cache = output.get("cache")
            if not hasattr(cache, "reorder_cache"):
                raise RepoError(
                    f"{type(model).__name__} keeps no cache whose rows can be rearranged; use "
                    "another model, and the transformers of requirements.txt"
                )
            if len(source) != len(mask):  # if equal, no row was shared or dropped
                index = torch.tensor(source, device=model.device)
                cache.reorder_cache(index)  # selects rows, one also several times
                logits, mask = logits[index], mask[index]

            policy = torch.distributions.Categorical(
                logits=logits / (temperature or 1.0), validate_args=False  # which takes time
            )
            tokens = policy.sample() if temperature else policy.mode  # [texts]
            drawn_logps = policy.log_prob(tokens)  # [texts]
            for (ids, logps), token, logp in zip(texts, tokens.tolist(), drawn_logps.tolist()):
                ids.append(token)
                logps.append(logp)

            source = [n for n, (ids, _) in enumerate(texts) if ids[-1] not in ends]
            texts = [texts[n] for n in source]
            if not texts:
                break
            inputs = tokens[:, None]  # [texts, 1], of those that have just ended too
            positions = mask.sum(1, keepdim=True)  # of the new token, as above
            mask = torch.hstack([mask, torch.ones_like(inputs)])
    return completions


def pad(rows, side, device):
    """Lists of unequal lengths as one tensor [B, longest], filled up with 0 on the side given."""
    tensors = [torch.tensor(row, device=device) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side)


def autocast():
    """On CUDA bf16 matrix products, and so bf16 logits, over fp32 weights; elsewhere fp32.

    In bf16 weights a step of 1e-6 would vanish. The softmax over the vocabulary is always taken in
    fp32. Cards that only emulate bf16 (T4, V100) are quicker in fp32.
    """
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, enabled=bf16)  # does nothing to a model on a CPU


# ----------------------------------------------------------------------------------- 2. rephrase


@timed("seconds/rephrase")
def write_guides(model, tokenizer, problems, cfg, reward_fn):
    """Step 2: a text for each problem with its reward: o_rep, or by `cfg.guidance` the expert's own
    text, or none at all.
    """
    if cfg.guidance == "none" or not problems:
        return []
    write = rephrase if cfg.guidance == "rephrase" else expert_completions
    guides = write(model, tokenizer, problems, cfg)
    score(guides, reward_fn)
    return guides


def rephrase(model, tokenizer, problems, cfg):
    """o_rep ~ π_old(·|P(q,k)) for each problem (Eq. 5), cleaned, as a completion of the plain q.

    By default drawn greedily (ours): at T = 1 a small model loses its way in the steps that it was
    shown. The cleaned text is encoded anew, and so its tokens may differ from those drawn. A
    truncated draft gives an o_rep without end token, which may be let in all the same. The update
    scores it at `temperature`, as all.
    """
    drafts = complete(
        model, tokenizer, cfg.rephrase_prompt, problems, 1, cfg.rephrase_temperature, cfg
    )
    rephrases = []
    for [draft] in drafts:
        end = [] if draft.truncated else draft.tokens[-1:]
        o_rep = as_completion(tokenizer, draft.problem, clean_rephrase(draft.text), end, cfg)
        o_rep.draft = draft.text
        rephrases.append(o_rep)
    return rephrases


def expert_completions(model, tokenizer, problems, cfg):
    """The experts' own texts as completions of their questions."""
    end = end_tokens(model, tokenizer)[:1]
    return [as_completion(tokenizer, p, p["knowledge"], end, cfg) for p in problems]


def as_completion(tokenizer, problem, text, end, cfg):
    """A text from elsewhere as a completion of the plain question, never of P(q,k) (Eq. 11).

    It is encoded as what follows a prompt: no BOS, nothing in it becomes a control token, and the
    ids in `end` close it; without them it is truncated.
    """
    prompt = encode_prompt(tokenizer, fill(cfg.question_prompt, problem))
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return Completion(problem, prompt, ids + end, text, truncated=not end)


def clean_rephrase(text):
    """The draft without what betrays that it is a rephrase, to read as a direct answer to q.

    1. Thoughts go. 2. Of the pieces between control tokens spelled as text the first that is not
    blank stays. 3. At both ends sentences go that chat or speak of the source, unless they state a
    figure or formula. 4. If what stays still speaks of its source, it is refused: nothing stays, as
    another cut would leave a hole, and train it.
    To delete such text is reported; to refuse is ours, and so are the patterns, some usual English
    wordings: below, where the paper ends.
    """
    text = text.rstrip("\ufffd")  # half a character, where a draft was cut off
    text = next(filter(str.strip, re.split(OUTSIDE, text)), "")  # 1 and 2
    sentences = re.findall(SENTENCE, text)
    kept = [
        n
        for n, sentence in enumerate(sentences)
        if re.search(FACT, sentence) or not re.search(CHATTER, sentence)
    ]
    answer = "".join(sentences[kept[0] : kept[-1] + 1] if kept else [])
    return "" if re.search(SOURCE, answer) else answer.strip()


# ---------------------------------------------------------------------------------- 3. injection


def gate_opens(group, cfg):
    """γ_fail ≥ ρ, where γ_fail is the share of a group's rewards below δ (reported)."""
    return mean(o.reward < cfg.fail_threshold for o in group) >= cfg.gate_threshold


def replace_worst(group, guide):
    """Puts the guide, o_rep, in the place of the group's lowest reward (reported).

    Ties go to the first, and only a guide of a higher reward goes in (both ours); it need not
    reach δ. With rewards of 0 and 1 and ρ = 1 to ask for a higher one changes nothing: a guide of
    0 would join a group of zeros, which has no advantages. With graded rewards a worse guide would
    make the failures look good. An empty text, which is what a refused draft leaves, stays out
    whatever its reward. As k shows the answer, a right guide may still reason wrongly.
    """
    worst = min(group, key=lambda o: o.reward)
    if guide.text and guide.reward > worst.reward:
        guide.replaced = worst
        group[group.index(worst)] = guide


# ------------------------------------------------------------------------------------- 4. update


def assign_advantages(groups):
    """Step 4 begins: gives each completion its A_i, relative to the rewards of its group."""
    for group in groups:
        for o, advantage in zip(group, group_advantages([o.reward for o in group])):
            o.advantage = advantage


def group_advantages(rewards):
    """A_i = (R_i - mean R) / (std R + 1e-6) of the rewards of one group, a list.

    The unbiased std and the 1e-6 are ours. `statistics.mean` is exact (a sum of floats is not), so
    that equal rewards give exactly 0: a rounding error would pass for a signal, and AdamW would go
    on by its momentum.
    """
    average = statistics.mean(rewards)
    deviation = statistics.stdev(rewards)
    return [(reward - average) / (deviation + 1e-6) for reward in rewards]


@timed("seconds/update")
def update(model, optimizer, groups, cfg, reference=None):
    """Step 4 ends: `updates_per_batch` optimizer steps that raise J. Returns metrics.

    In the first update the ratio is exactly 1, as its denominator is read off the same pass, and
    the gradient is REINFORCE's; from the second on the clip may act. A batch without signal
    changes nothing (ours).
    Raises: RepoError if kl_beta is set without a reference, or if sampler and trainer disagree;
    RuntimeError if a gradient is not finite. The weights do not move by such a gradient.
    """
    if cfg.kl_beta and reference is None:
        raise RepoError(f"kl_beta is {cfg.kl_beta} and there is no reference model; pass one")
    # Without an advantage and a KL term a completion has no gradient, and need not be read. The
    # loss is divided by the number of all completions, so leaving it out changes nothing.
    completions = sum(groups, [])
    trained = [o for o in completions if o.advantage or cfg.kl_beta]
    kls, norms, clip_acts, difference = [], [], [], None
    for _ in range(cfg.updates_per_batch if trained else 0):
        optimizer.zero_grad()  # also of what a step that was stopped may have left
        for batch in micro_batches(trained, cfg.micro_batch_tokens):
            policy_logps = token_logps(model, batch, cfg.temperature)
            loss = 0.0
            for o, logps in zip(batch, policy_logps):
                # The denominator is π_old(·|q), for o_rep too, although π_old(·|P(q,k)) wrote it
                # (Eq. 11). It is read off the first pass, before any weight moves (ours): that
                # costs nothing, and no other code path can disturb the ratio.
                if not o.old_logps:
                    o.old_logps = logps.tolist()
                old_logps = logps.new_tensor(o.old_logps)
                loss_o, acts = policy_loss(logps, old_logps, o.advantage, cfg.clip_epsilon)
                loss += loss_o
                clip_acts += acts.tolist()
            if cfg.kl_beta:
                with torch.no_grad():
                    reference_logps = token_logps(reference, batch, cfg.temperature)
                for logps, fixed in zip(policy_logps, reference_logps):
                    kl = kl_loss(logps, fixed)
                    loss += cfg.kl_beta * kl
                    kls.append(kl.item())
            (loss / len(completions)).backward()
        difference = sampler_diff(trained)  # of the first pass; raises before any weight moves
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), cfg.max_grad_norm, error_if_nonfinite=True
        )
        norms.append(norm.item())
        optimizer.step()
    optimizer.zero_grad()  # frees the memory of the gradients for sampling
    return {
        "kl": mean(kls),
        "grad_norm": mean(norms),  # before it is scaled down
        "clip_ratio": mean(clip_acts),
        "sampler_logp_diff": difference,
    }


def token_logps(model, completions, temperature):
    """log π_θ(o_t | q, o_<t) at T of each completion's tokens, a list of [|o_i|], fp32, in nats.

    Padding is on the right, where a causal model never looks. The logits at a place predict the
    token at the next one, so the |o| logits before the place of o's last token predict o, and none
    is needed before the last token of the shortest prompt. Places are counted from the end (-1, -2
    ...), as a model may return the logits of all L:

        place                          -4 -3 -2 -1
        prompt a b, completion C D      a  b  C  D    the logits at -3 and -2 predict C and D
        prompt e,   completion F        e  F  .  .    the logits at -4 predict F
    """
    ids = pad([o.ids for o in completions], "right", model.device)  # [B, L]
    length = ids.shape[1]
    needed = length - min(len(o.prompt) for o in completions) + 1
    with autocast():
        logits = model(ids, use_cache=False, logits_to_keep=needed).logits  # [B, needed or L, V]
    logps = []
    for o, row in zip(completions, logits):
        last = len(o.ids) - 1 - length  # the place of its last token
        scores = row[last - len(o.tokens) : last].float() / temperature  # [|o|, V]
        targets = torch.tensor(o.tokens, device=model.device)
        logps.append(-torch.nn.functional.cross_entropy(scores, targets, reduction="none"))
    return logps


def policy_loss(logps, old_logps, advantage, clip_epsilon):
    """-1/|o| Σ_t min(r_t A, clip(r_t, 1-ε, 1+ε) A) with r_t = π_θ / π_old, both under q.

    A completion's part of J. Log-probabilities are [|o|]. Returns the loss, a scalar, and
    where the clip acts, [|o|].
    """
    # Bounded, as infinity times the 0 of the clip would be a NaN in the gradient.
    ratio = (logps - old_logps).clamp(max=60.0).exp()
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantage
    return -torch.minimum(unclipped, clipped).mean(), clipped < unclipped


def kl_loss(logps, reference_logps):
    """1/|o| Σ_t (s_t - log s_t - 1), s_t = π_ref / π_θ: the k3 estimator of D_KL(π_θ ‖ π_ref).

    It holds for tokens that π_θ drew, and is taken on all that is trained, o_rep too.
    """
    log_ratio = (reference_logps - logps).clamp(max=60.0)  # as in `policy_loss`
    return (log_ratio.exp() - log_ratio - 1).mean()


def micro_batches(completions, max_tokens):
    """The completions in batches of equally many rows (the last may have fewer): as many as the
    longest lets into `max_tokens`, at least one. The longest come first: where memory is too short,
    it is found early.
    """
    completions = sorted(completions, key=lambda o: -len(o.ids))
    rows = max(1, max_tokens // len(completions[0].ids))
    return chunks(completions, rows)


def sampler_diff(completions):
    """max |log π of the sampler - log π of the trainer| over the sampled tokens trained, in nats.

    Raises: RepoError if the mean is above 0.1 nats a token. Rounding in bf16 gives some 0.03
    (a single token may be 2 nats apart at T = 0.1), a fault as a sampler at 0.3 T some 0.5.
    """
    differences = [
        abs(sampler - trainer)
        for o in completions
        for sampler, trainer in zip(o.sampler_logps, o.old_logps)
    ]
    if differences and not mean(differences) <= 0.1:  # also true of a NaN
        raise RepoError(
            f"sampler and trainer are {mean(differences):.2f} nats a token apart: this model "
            "ignores positions or attention masks, or keeps a cache whose rows cannot be "
            "rearranged; use another"
        )
    return max(differences, default=None)


# -------------------------------------------------------------------------------- what is measured


def as_sampled(completions):
    """The rollouts of a group, or of several, as they were sampled, before any was replaced."""
    return [o.replaced or o for o in completions]


@torch.no_grad()
def step_metrics(model, tokenizer, hard, groups, guides, cfg):
    """What a step shows, under TRL's names where it has one; None where there is nothing to see.

    The rewards are those of the rollouts, before injection. `hard` are the groups whose gate
    opened. Each `logp/` is a mean per token under the plain q, in nats, of texts that are not all
    of the same questions, so compare their course and not single steps:

        logp/rollout     all rollouts of hard groups, before the update
        logp/rephrase    the rephrases trained, before the update
        logp/expert      the expert's text where there is a guide, after it, in passes of its own
    """
    own = as_sampled(sum(groups, []))
    hard_own = as_sampled(sum(hard, []))
    experts = expert_completions(model, tokenizer, [o.problem for o in guides], cfg)
    expert_logps = [
        logp for o in experts for logp in token_logps(model, [o], cfg.temperature)[0].tolist()
    ]
    rephrases = guides if cfg.guidance == "rephrase" else []
    length = mean(len(o.tokens) for o in rephrases if o.text)  # not of those refused
    return {
        "reward": mean(o.reward for o in own),
        "entropy": -mean(logp for o in own for logp in o.sampler_logps),  # estimated, in nats
        "frac_reward_zero_std": mean(
            len({o.reward for o in as_sampled(group)}) == 1 for group in groups
        ),
        "completions/mean_length": mean(len(o.tokens) for o in own),
        "completions/clipped_ratio": mean(o.truncated for o in own),
        "injections": sum(guide.replaced is not None for guide in guides),
        "rephrase/success": mean(o.reward >= cfg.fail_threshold for o in rephrases),
        "rephrase/mean_length": length,
        "rephrase/length_ratio": length and length / mean(len(o.tokens) for o in hard_own),
        "rephrase/clipped_ratio": mean(o.truncated for o in rephrases),
        "logp/expert": mean(expert_logps),
        "logp/rephrase": mean(logp for o in rephrases for logp in o.old_logps),
        "logp/rollout": mean(logp for o in hard_own for logp in o.sampler_logps),
        **SECONDS,
    }


def episode(groups, guides):
    """The first question whose gate opened, with all its texts and rewards, for a person."""
    guide = guides[0]
    [group] = [group for group in groups if group[0].problem is guide.problem]
    return {
        **guide.problem,
        "rollouts": [{"reward": o.reward, "text": o.text} for o in as_sampled(group)],
        "draft": guide.draft,
        "guide": guide.text,
        "reward": guide.reward,
        "injected": guide.replaced is not None,
    }


def accuracy(model, tokenizer, problems, cfg, reward_fn):
    """The share of problems, 0 to 1, whose greedy completion does not fail."""
    model.eval()
    parts = chunks(problems, cfg.batch_size * cfg.group_size)
    return mean(
        o.reward >= cfg.fail_threshold
        for part in tqdm(parts, "accuracy", leave=False, disable=None)
        for (o,) in rollout(model, tokenizer, part, 1, 0.0, cfg, reward_fn)
    )


# ---------------------------------------------------------- here the paper ends. Prompts, in tokens


def fill(template, problem):
    """The template with {question} and {knowledge} filled in; other braces stay as they are."""
    return re.sub(r"\{(question|knowledge)\}", lambda slot: problem[slot[1]], template)


def chat(tokenizer, *contents):
    """The turns, in the first shape that the template takes, and the text that it makes of them.

    `contents` are of user, assistant and user in turn: one for a prompt, three for `end_tokens`,
    which looks at how the template closes the assistant's.
    Raises: RepoError if it refuses all shapes or leaves out what the user says.
    """
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    # Plain text, text in parts, or with the system's turn, which some templates demand.
    for shape in (turns, parts, [{"role": "system", "content": ""}, *turns]):
        try:
            shown = tokenizer.apply_chat_template(shape, tokenize=False)
        except Exception:  # a template is a program, and raises what it likes
            continue
        if contents[0].strip() in shown:
            return shape, shown
    raise RepoError("the chat template refuses or leaves out what the user says; use another")


def encode_prompt(tokenizer, text):
    """Token ids of the user's turn `text`, up to where the assistant's answer begins.

    Control tokens that the text spells out stay text (`sanitize_control_tokens`, of transformers
    5.24). A thinking model is asked not to think.
    Raises: RepoError if the chat template opens a block of thoughts all the same.
    """
    if not tokenizer.chat_template:  # a base model
        # After the line break at its end an answer begins without a blank, as does a text encoded
        # alone (`as_completion`).
        ids = tokenizer(text + "\n\nSolution:\n", split_special_tokens=True).input_ids
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # some append an EOS
    turns, _ = chat(tokenizer, text)
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, enable_thinking=False, sanitize_control_tokens=True
    ).input_ids
    if re.search(r"<[^<>/]*(think|reason)[^<>/]*>\s*$", tokenizer.decode(ids[-16:])):
        raise RepoError(
            "the chat template opens a block of thoughts even with enable_thinking="
            "False, and a rephrase has none; use a model that can answer without"
        )
    return ids


def end_tokens(model, tokenizer):
    """The ids that end a completion; the first is put at the end of an expert's text.

    That is what the chat template writes after an answer (`<end_of_turn>` for Gemma, `<|end|>` for
    Phi, whose EOS is another token), else the EOS.
    Raises: RepoError if there is none.
    """
    configured = model.generation_config.eos_token_id  # an id, several or None
    ends = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    if tokenizer.chat_template:
        _, shown = chat(tokenizer, "What is it?", "It is 4242.", "Why?")
        _, _, after = shown.partition("4242.")  # no template has a 4242 of its own
        after = tokenizer(after, add_special_tokens=False).input_ids
        # The first control token after the answer closes the turn.
        ends = [i for i in after if i in tokenizer.added_tokens_decoder][:1] + ends
    ends = [i for i in ends if i is not None]
    if not ends:
        raise RepoError("no token ends an answer; set the tokenizer's eos_token")
    return ends


# ------------------------------------------------------------------- what cleaning looks for (ours)
#
# What these keep, cut and refuse is a list of texts in test_repo.py, easier to read than they are.

OUTSIDE = (  # thoughts, even if never opened or closed; control tokens spelled as text
    r"(?s)^.*</think(?:ing)?>|<think(?:ing)?>.*$"
    r"|(?:<[|｜][\w▁]{3,40}[|｜]>|</?s>|<(?:start|end)_of_turn>)(?:(?:assistant|model)(?=[<\n]))?"
)
# A sentence, with the "2." or "Note:" before it.
SENTENCE = r"[ \t*_#>(-]*(?:\d+\.|\w+:)?.*?(?:[.!?:][*_)\"'”’]*(?=\s)|\n|$)"
SOLUTION = r"(?:solution|answer|explanation)\b(?! (?:of|set|choice|option))"
SOURCE = (  # speaks of the solution that was shown, or of writing it anew
    r"(?i)\b(?:my|our|your) own words\b|\bsolve (?:it|the problem) anew\b"
    r"|\b(?:rephras|reword|paraphras)(?:e|ed|ing)\b"
    r"(?! (?:the|this) (?:problem|question|condition|equation|expression|statement)| as)"
    rf"|\b(?:rewritten|reference|provided|expert(?:['’]s)?) (?:\w+ )?(?:version|{SOLUTION})"
    # "the reference says so" speaks of it, "the reference point" does not
    r"|\bthe reference\b(?!-|(?:['’]s)? (?!(?:gives|is|says|shows|states|uses)\b)\w)"
    r"|\b(?:my|our|your|these|above|given|provided) notes\b"
    r"|\b(?:based on|follow\w*|from|in|per|through|(?:according|refer\w*) to|understand\w*|us\w+)"
    r" the notes\b(?! (?:in|of|on)\b)"
    r"|\bthe notes (?:above|(?:giv|explain|indicat|mention|provid|sa[iy]|show|stat|sugg|tell)\w*)"
    r"|\byou(?:['’]ve| have)? (?:explained|mentioned|noted|provided|stated)\b"
    rf"|\b{SOLUTION} (?:you gave|says|states|explains)\b"
    rf"|\b{SOLUTION} (?:above|given|provided)(?= *[,.;:)]| \w+s\b|$)"
    r"|(?:according to|(?:as )?per|based on|match\w*|agree\w* with|consistent with|follow\w*"
    rf"|as (?:in|shown in)) the (?:above|correct|given|model|original|sample) {SOLUTION}"
)
FACT = r"[\d=\\][^:\d=\\]*$"  # a digit, = or \; but "Step 2:" only announces one
CHATTER = (  # no beginning or end of an answer; all but SOURCE is harmless in the middle
    rf"{SOURCE}"  # begins with (?i)
    r"|^(?:[^\w\\$`|()\[\]{}]|_)*$"
    r"|^\W*(?:sure|certainly|absolutely|of course|okay|understood|got it)\W*$"
    r"|^\W*(?:\w[\w ]*[,!] )?(?:here(?:['’]s| is)|below is) (?:an?|the|my|your) (?:[\w-]+ ){0,3}"
    rf"(?:version|{SOLUTION})[^=\\\d]*$"
    r"|\bhope (?:it|that|this) (?:\w+ )?(?:answers|clarifies|helps|is clear)"
    r"|\blet me know (?:how|if)\b|\bfeel free to\b|\bwould you like\b|\banything else I can\b"
    r"|\bif you (?:have any|need) (?:\w+ ){0,2}(?:help|questions)"
)


# ------------------------------------------------------------------ a reward for mathematics (ours)
#
# What it takes for right and for wrong is a table in test_repo.py, easier to read than patterns.

NUMBER = r"""(?x)  # "12", "1,200", "1.5", ".5" or "3/4", but not "1,20"
(?!.{1000})  # Fraction does not read numbers of any length
[+-]?(?:
    (?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?
    |\.[0-9]+
    |[0-9]+/0*[1-9][0-9]*
)"""
UNIT = r"""(?x:  # a final \text{cm}^2 behind a digit or \pi, but
(?:(?<=[0-9])(?<!_.)|(?<=\\pi))\\text\{(?![^{}]*\b(?:
    # no single letter but those that are units, as m and s
    [^\WACFJLNVWghlms]
    # and no word that makes another answer of it, as a sign, a base or a scale does
    |(?i:pi|and|or|to|not|no|is|at|than|by|if|when|unless|except\w*|excluded|impossible|undefined
    |plus|minus|over|under|below|less|choose|rem|remainder|negative|root|squared|cubed|factorial
    |base|mod|modulo|binary|ternary|octal|hex\w*|repeating|recurring|periodic|approx\w*
    |rad|radians?|times|twice|fold|doubled?|tripled?|zero|ones?|twos?|three|four|five|six|seven
    |eight|nine|tens?|eleven|twelve|\w*teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundr\w*
    |thou|thousand\w*|\w*illi(?:on|ard)\w*|[bm]ln|[bmt]n|mil|mio|grand|kilo|mega|giga|lakhs?
    |crores?|doz|dozens?|scores?|gross|pairs?|couples?|point|cent|percent\w*|pct|pp|ppm|basis|bps
    |half|halves|thirds?|quarters?
    |\w*(?:four|fif|six|seven|eigh|nin|ten|teen|eleven|twelf|tie)ths?|st|nd|rd|th)
)\b)[a-zA-Z][a-zA-Z ./²³-]*(?<![ ])\}(?:\^[23])?$)"""
NAME = r"[a-zA-Z]\(\w\)|\([a-zA-Z](?:, ?[a-zA-Z])+\)|\\?(?!(?i:not)(?:=|\\in))[a-zA-Z](?a:\w*)"
LABEL = rf"^(?:{NAME})(?:=(?!.*=)|\\in(?=[\[(\\]))|{UNIT}"  # x=, f(x)=, (x,y)=, x\in or a unit
REWRITES = {  # pattern: replacement, one after the other, each on what the ones before it left
    "[−–]": "-",
    r"(?<=[0-9])(?:\{,\}|,\\!|\\[,!])(?=[0-9]{3})": ",",  # 1{,}000 and 1\,000
    r"(?:\\(?:displaystyle|q?quad|[bB]igg?[lr]?)(?![a-zA-Z])|\\(?:left|right)(?![a-z])\.?"
    r"|(?<!\\)\\[,;:!$% ]|\^ ?(?:\\circ|\{\\circ\})|\\degree|[%°$~\s])+": " ",  # spacing, signs
    r" ?(\\[a-zA-Z]+(?= [^a-zA-Z])|[^\w ,.]) ?": r"\1",  # blanks around signs, and in \pm 3
    r"(?<![\w)}])\+(?=\\infty)"  # (3,+\infty)
    r"|(?<=\\[gln]e)q(?:slant)?(?![a-zA-Z])"  # \leq is \le
    r"|(?<=\\)[dt](?=frac)|\.$": "",  # \dfrac is \frac; the full stop
    r"^\{+((?:[^{}]|\{[^{}]*\})*)\}+$": r"\1",  # {{42}}
    r"\{bmatrix\}": "{pmatrix}",
    r"\\(?:mathrm|mbox|text(?:bf|it|rm))(?=\{)": r"\\text",
    r"([\^_])\{([0-9a-zA-Z])\}(?![0-9])": r"\1\2",  # x^{2}, but not x^{12}: x^12 is x^1 2
    r"\\(frac|sqrt)(?![a-zA-Z]) ?(\w)": r"\\\1{\2}",  # \sqrt34 is \sqrt{3}4
    r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\}) ?(\w)": r"\1{\2}",  # \frac{3}4
    r"(?<![^=])([+-]?)\\frac\{(-?[\w.\\]+)\}\{([0-9]+|[a-z]|\\[a-z]+)\}(?=\\text\{|$)": r"\1\2/\3",
    rf"(?!{UNIT})\\(?:text|mathbf|boldsymbol)\{{([^{{}}]*)\}}": r" \1 ",
    " +": " ",
    r" ?([^\w ,.}]) ?": r"\1",  # blanks that \text has left around signs: \text{Na}^+
    r"(?<=[0-9]) (?=[a-zA-Z](?![a-zA-Z]))|(?<=[a-z])\.$": "",  # 2 x is 2x; \text{Paris.}
    r"^\(?([A-J])[.)]*$": r"\1",  # a choice: (B), B) or B.
}


def last_boxed(text):
    r"""What the last `\boxed{...}` holds, inner braces included; "" if none or never closed."""
    *before, tail = re.split(r"\\boxed\s*", text)
    depth = 0
    for i, char in enumerate(tail if before else ""):
        depth += (char == "{") - (char == "}")
        if depth <= 0:  # the end, or no brace to begin with
            return tail[1:i]
    return ""


def normalise(answer):
    r"""(an exact number, or else a text without typography; the set of its labels: `x=` and unit).

    2+2 is text, as nothing is evaluated.
    """
    for pattern, replacement in REWRITES.items():
        answer = re.sub(pattern, replacement, answer.strip())
    labels = set(re.findall(LABEL, answer))
    answer = re.sub(LABEL, "", answer).strip()
    if re.fullmatch(NUMBER, answer):
        return Fraction(answer.replace(",", "")), labels
    answer = re.sub(" ?, ?", ",", answer)
    # Words may differ in their capitals; CO, AaBb and ABC are none.
    is_word = re.fullmatch("(?i:no)|(?=.*[a-z]{2})(?!.*[a-zA-Z][A-Z])[a-zA-Z ]{3,}", answer)
    return answer.casefold() if is_word else answer, labels


def boxed_reward(completion, answer):
    r"""1.0 if the last `\boxed{...}` is the answer, else 0.0, for any string, in linear time.

    One side may have labels that the other lacks: x=3 is 3, and 3 cm is 3, but 3 cm is not 3 m.
    The signs of percent and degrees do not count.
    When in doubt 0.0: a false "right" teaches a mistake, a false "wrong" only misses a chance.
    """
    box, labels = normalise(last_boxed(completion))
    gold, others = normalise(answer)
    return float(gold != "" and box == gold and (labels <= others or others <= labels))


# --------------------------------------- the command line: a real model, real data, one device


@dataclass(frozen=True)
class Run:
    """Model, data and output."""

    model: str
    """hub name or folder of a causal language model"""
    dataset: str
    """hub name, or a .json, .jsonl, .csv or .parquet file"""
    out: str
    """folder for metrics, episodes, the checkpoint and the model"""
    subset: str | None = None
    """configuration of the dataset, where it has several"""
    split: str = "train"
    """split to train on, also a slice: train[:1000]"""
    eval_split: str | None = None
    """split for the accuracy before and after training"""
    question_column: str = "question"
    """column of the question"""
    knowledge_column: str = "answer"
    """column of the expert's solution"""
    answer_column: str = "answer"
    """column of the answer, bare, boxed or after ####"""
    steps: int = 100
    """training steps"""
    save_every: int = 50
    """steps between checkpoints; 0: at the end only"""
    resume: bool = False
    """go on from the checkpoint in --out, with the same settings and data"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, cpu ..."""


@contextmanager
def explaining(what, advice):
    """Whatever a library raises in the block ends in a RepoError of one line."""
    try:
        yield
    except Exception as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise RepoError(f"{what}: {reason}; {advice}") from error


def load_model(name, device):
    """(model with fp32 weights, tokenizer); no code of the checkpoint is run.

    Raises: RepoError if they cannot be loaded, are not whole or do not belong together.
    """
    with explaining(
        f"{name!r} is no causal language model to load",
        "give a hub name, or a folder that save_pretrained has written",
    ):
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="float32",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if found["missing_keys"]:  # they would be random
        raise RepoError(
            f"{name!r} lacks weights, {sorted(found['missing_keys'])[0]} for one; save the whole "
            "language model"
        )
    rows = model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) >= rows:
        raise RepoError(f"{name!r} has a tokenizer of more tokens than its {rows} embeddings")
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False  # a loss not ours, which fails with a cache
    return model.to(device), tokenizer


def in_box(text):
    r"""Puts "The final answer is \boxed{42}." for GSM8K's last line `#### 42`, as a bare box gets
    lost when it is rephrased, and deletes its `<<6*7=42>>`.

    Any other text stays as it is: there `####` is a heading, `<<` an operator, or a box is there.
    """
    mark = re.fullmatch(r"(?s)(?!.*\\boxed)((?:.*\n)?)#### *([^#\s][^\n]*)", text)
    if not mark:
        return text
    solution = re.sub(r"<<[-+*/%().,\d ]+=[-.,\d]+>>(?=[-.\d])", "", mark[1])
    return f"{solution}The final answer is \\boxed{{{mark[2]}}}."


def as_text(value):
    """What a cell says: text, an integer, or the one turn of a chat besides the system's."""
    match value:
        case [{"content": str(turn)}] | [{"role": "system"}, {"content": str(turn)}]:
            value = turn
        case None | list():
            value = ""
    return str(value).strip()


TEXT = r"Value\('((large_)?string(_view)?|u?int\d+)'\)"
READABLE = rf"{TEXT}|List\(\{{.*'content': {TEXT}.*\}}\)"  # types that keep the file's spelling


def load_problems(run, split):
    r"""The split, also a slice of it, as dicts of question, knowledge and answer.

    A record that lacks one of them is left out; how many are kept is printed. The answer is the
    last `\boxed{}` of its column (see `in_box` for ####), or else all its text, unless that is the
    knowledge itself.
    The fields of a column of dicts are columns: `reward_model.ground_truth`.
    Raises: RepoError if a column cannot be read, or no record is left; also for numbers with a
    point, dates, booleans or labels, whose spelling in the file is lost: 42 may have become 42.0.
    """
    columns = [run.question_column, run.knowledge_column, run.answer_column]
    readers = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    reader = readers.get(Path(run.dataset).suffix)  # None: a dataset of the hub
    if reader is None and Path(run.dataset).exists():
        raise RepoError(f"{run.dataset!r} must be a file that ends in one of {list(readers)}")
    options = {"data_files": glob.escape(run.dataset)} if reader else {}
    if reader == "json":
        options["chunksize"] = -1  # the whole file: the types of its first part are not for all
    if reader == "csv":  # cells as they are written (007, NA), none the name of a row
        options |= dict(
            converters=dict.fromkeys(columns, str),
            keep_default_na=False,
            na_values=[""],
            index_col=False,
            chunksize=None,
        )
        warnings.filterwarnings("error", "Length of header")  # else a long row would be shifted
    with explaining(
        f"{run.dataset!r} has no readable {columns} in {split!r}",
        "a file must be UTF-8 (a .csv with commas) and not empty, and has only the split train or "
        "a part of it, train[:200]",
    ):
        data = load_dataset(reader or run.dataset, run.subset, split=split, **options)
        data = data.flatten().select_columns(columns)  # one may serve twice
        records = data.to_list()
    for column, kind in data.features.items():
        if not re.fullmatch(READABLE, str(kind)):
            raise RepoError(
                f"column {column!r} holds {kind}; write text or integers, or a CSV file, where "
                "all is text"
            )
    problems = []
    for record in records:
        question, knowledge, answer = (as_text(record[column]) for column in columns)
        answer = last_boxed(in_box(answer)) or answer
        if question and knowledge and answer not in ("", knowledge):
            problems.append(dict(question=question, knowledge=in_box(knowledge), answer=answer))
    print(f"{len(problems)} of {len(records)} records have question, knowledge and answer")
    if not problems:
        raise RepoError(
            f"{run.dataset!r} has no usable record in {split!r}: each needs text or a chat of one "
            f"turn in {columns}; a solution needs its answer in a box or in a last line #### 42"
        )
    return problems


def fitting(problems, model, tokenizer, cfg):
    """The problems of which both prompts, q and P(q,k), leave room for a completion.

    P(q,k) counts with --guidance none too, so that all methods have the same problems. If some are
    left out, it is printed how many are kept.
    Raises: RepoError if none of them fits.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    kept = [
        problem
        for problem in problems
        if all(
            len(encode_prompt(tokenizer, fill(template, problem))) + cfg.max_new_tokens <= context
            for template in (cfg.question_prompt, cfg.rephrase_prompt)
        )
    ]
    if kept != problems:  # an empty list is no mistake
        print(f"{len(kept)} of {len(problems)} problems leave room for {cfg.max_new_tokens} tokens")
        if not kept:
            raise RepoError(
                f"no prompt and {cfg.max_new_tokens} tokens fit the model's context of {context}; "
                "lower max_new_tokens"
            )
    return kept


def draw_batch(problems, step, cfg):
    """The problems of a step, by seed and step alone: from all of them, without epochs (ours)."""
    draw = random.Random(f"{cfg.seed} {step}")
    return draw.sample(problems, min(cfg.batch_size, len(problems)))


MAY_CHANGE = {"out", "steps", "save_every", "resume", "device", "micro_batch_tokens"}  # on resume


def save_checkpoint(file, logs, model, optimizer, settings):
    """Writes beside the old file and then moves over it: a kill leaves the old one or the new."""
    state = dict(
        logs=[log.read_text() for log in logs],
        settings=settings,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
    )
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


def load_checkpoint(file, settings):
    """What `save_checkpoint` wrote; the weights stay on disk until they are used.

    Raises: RepoError if it is damaged, or if a setting has changed, is new or is gone.
    """
    with explaining(f"{file} cannot be read", "choose another --out"):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    then = state["settings"]
    for name, _ in then.items() ^ settings.items():  # what is not in both
        if name not in MAY_CHANGE:
            raise RepoError(
                f"{file} was made with {name} = {then.get(name)!r}, now it is "
                f"{settings.get(name)!r}; change it back or choose another --out"
            )
    return state


def append(file, record):
    """Adds a line of JSON to the file."""
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def train(run, cfg, reward_fn):
    """The run of the command line. What can be checked without the model is checked first.

    Raises: RepoError if --out cannot be written or --device used, if --out holds a run and --resume
    is not given, if more than --steps are done, or if no expert's text, to be injected verbatim, is
    rewarded.
    """
    out = Path(run.out)
    checkpoint = out / "checkpoint.pt"
    logs = out / "metrics.jsonl", out / "episodes.jsonl"
    metrics_log, episodes_log = logs
    with explaining("--out or --device cannot be used", "choose another"):
        out.mkdir(parents=True, exist_ok=True)
        metrics_log.touch()
        torch.empty(0, device=run.device)
    if not run.resume and (checkpoint.exists() or metrics_log.read_text()):
        raise RepoError(f"{run.out!r} holds a run; go on with --resume or choose another --out")
    problems = load_problems(run, run.split)
    held_out = load_problems(run, run.eval_split) if run.eval_split else []
    settings = vars(run) | vars(cfg)
    settings["data"] = f"{len(problems)} problems, {zlib.crc32(repr(problems).encode())}"
    state = load_checkpoint(checkpoint, settings) if checkpoint.exists() else None
    saved = state["logs"] if state else ["", ""]  # a killed run may be past its checkpoint
    done = saved[0].count("\n")  # a step is a line of metrics
    if run.steps < max(done, 1):
        raise RepoError(f"--steps is {run.steps}; give at least 1, and at least the {done} done")
    if cfg.guidance == "verbatim" and not any(
        reward_fn(p["knowledge"], p["answer"]) >= cfg.fail_threshold for p in problems
    ):
        raise RepoError(
            "the reward takes no expert's text; `boxed_reward` asks for \\boxed{answer}"
        )

    model, tokenizer = load_model(run.model, run.device)
    # The reference and the first accuracy are those of --model, also when a run is resumed.
    reference = copy.deepcopy(model) if cfg.kl_beta else None
    problems = fitting(problems, model, tokenizer, cfg)
    held_out = fitting(held_out, model, tokenizer, cfg)
    before = accuracy(model, tokenizer, held_out, cfg, reward_fn)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.learning_rate, weight_decay=0.0, fused=True
    )
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for log, text in zip(logs, saved):
        log.write_text(text)

    for step in tqdm(range(done, run.steps), disable=None):
        # What is random depends on seed and step alone, so a resumed run needs no random state to
        # equal one that was never stopped, on the same device with the same micro-batches.
        batch = draw_batch(problems, step, cfg)
        torch.manual_seed(1_000_000 * cfg.seed + step)
        metrics, groups, guides = train_step(
            model, tokenizer, optimizer, batch, cfg, reward_fn, reference
        )
        append(metrics_log, {"step": step, **metrics})
        if guides:
            append(episodes_log, {"step": step, **episode(groups, guides)})
        tqdm.write(f"step {step}: reward {metrics['reward']}, injections {metrics['injections']}")
        if step + 1 == run.steps or (run.save_every and (step + 1) % run.save_every == 0):
            save_checkpoint(checkpoint, logs, model, optimizer, settings)

    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    after = accuracy(model, tokenizer, held_out, cfg, reward_fn)
    summary = json.dumps(dict(accuracy_before=before, accuracy_after=after))
    (out / "summary.json").write_text(summary)
    print(summary)


def with_help(settings):
    """The dataclass; what stands below a field is also the help of its flag."""
    below = r'(\w+): .*\n +"""([^"]*)"""'
    for name, text in re.findall(below, inspect.getsource(settings)):
        settings.__dataclass_fields__[name].metadata = {"help": text}
    return settings


def main(argv=None, reward_fn=boxed_reward):
    """Parses the flags and trains; a RepoError ends in its message alone."""
    parser = HfArgumentParser(
        [with_help(Run), with_help(Config)], description=__doc__.partition("\n")[0]
    )
    try:
        flags = parser.parse_args(argv)  # ends with a usage line at an unknown flag
        train(*parser.parse_dict(vars(flags)), reward_fn)
    except RepoError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on from the last checkpoint, if there is one")


if __name__ == "__main__":
    main()
