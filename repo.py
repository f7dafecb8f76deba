"""RePO: Rephrasing Policy Optimization (arXiv 2602.10819), a reference implementation in one file.

For questions q, each with an expert's solution k (the off-policy knowledge) and a checkable answer a, one step is:

    1. Rollout     o_1..o_G ~ π(·|q), rewards R(o_i)                           rollout, sample, boxed_reward
    2. Rephrase    o_rep ~ π(·|P(q,k)): understand k, write it in own words    rephrase, rephrase_prompt, clean_rephrase
    3. Injection   if the share of failed rollouts is ≥ ρ, o_rep takes the     gate_opens, replace_worst
                   place of the rollout with the lowest reward
    4. Update      group-relative advantages and the clipped policy gradient,  group_advantages, token_logps,
                   o_rep scored under the plain q, never under P(q,k)          policy_loss, update

Read from top to bottom: settings, the steps, `train_step` (the algorithm box); there the paper ends and the command
line begins. Beside each choice stands whose it is; the paper's values are second-hand: no code is public.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Callable, Literal, Optional, get_args

import torch
from datasets import get_dataset_config_names, load_dataset
from torch.utils.checkpoint import checkpoint as recompute
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

RewardFn = Callable[[str, str], float]  # (completion text, answer) -> reward


class RepoError(ValueError):
    """Something given cannot work: the message says what was given, what is wrong with it and what to do."""


def check(settings, names: str, holds: Callable, must_be: str) -> None:
    """Errors: RepoError with name, value and what it must be, for the first of the `names` (blanks between) it is not."""
    for name in names.split():
        if not holds(value := getattr(settings, name)):
            raise RepoError(f"{name} is {value!r}; it must be {must_be}")


# ------------------------------------------------------------------------------------------------------- settings

QUESTION_PROMPT = "{question}\n\nReason step by step and put the final answer in \\boxed{}."
REPHRASE_PROMPT = """Below are a problem and a reference solution to it.

Problem:
{question}

Reference solution:
{knowledge}

First understand why the reference solution is right. Then solve the problem anew in your own words and your usual \
style, as if you had found the solution yourself. Never mention the reference. Write only the solution, and put the \
final answer in \\boxed{}."""


def setting(default, doc: str):
    """A dataclass field whose one-line documentation is also its flag's help."""
    return field(default=default, metadata={"help": doc})


@dataclass(frozen=True)
class Config:
    """The algorithm's settings, each a command-line flag too; (paper) or (ours) says whose value it is."""

    group_size: int = setting(8, "G, rollouts a question (paper)")
    batch_size: int = setting(16, "questions a step (ours, for one GPU; the paper has 512)")
    max_new_tokens: int = setting(512, "longest completion, in tokens (ours)")
    temperature: float = setting(1.0, "T; rollouts are drawn from, and scored under, softmax(logits / T) (ours)")
    guidance: Literal["rephrase", "none", "verbatim"] = setting(
        "rephrase", "what an open gate lets in: rephrase (paper), or, ours, verbatim (the expert's text) or none (GRPO)")
    fail_threshold: float = setting(0.5, "delta; a rollout with a reward below it has failed (ours)")
    gate_threshold: float = setting(1.0, "rho; the gate opens when at least this share of a group failed (ours)")
    verify: bool = setting(True, "inject only what is rewarded higher than the rollout it replaces (ours)")
    clip_epsilon: float = setting(0.2, "epsilon; the ratio is clipped to 1 - epsilon .. 1 + epsilon (ours)")
    kl_beta: float = setting(0.0, "beta of the KL term; at 0 no reference model is held in memory (ours)")
    loss_aggregation: Literal["sequence", "token"] = setting(
        "sequence", "sequence: mean over each, then over all (paper); token: one mean over all tokens (ours)")
    updates_per_batch: int = setting(1, "optimizer steps on each batch of rollouts (ours)")
    learning_rate: float = setting(1e-6, "AdamW's learning rate (paper), constant (ours)")
    weight_decay: float = setting(0.0, "AdamW's weight decay (ours)")
    max_grad_norm: float = setting(1.0, "the gradient is scaled down to this norm (ours)")
    micro_batch_tokens: int = setting(16384, "tokens with padding in one forward and backward pass; memory only (ours)")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower (ours)")
    question_prompt: str = setting(QUESTION_PROMPT, "the user's turn that asks the plain question q (ours)")
    rephrase_prompt: str = setting(
        REPHRASE_PROMPT, "P(q,k), the user's turn that asks for a rephrase; its sentences are deleted from the answer (ours)")
    seed: int = setting(0, "seed of the sampling and of the order of the questions (ours)")

    def __post_init__(self):
        """Refuses what cannot work before anything is done. Errors: RepoError."""
        check(self, "group_size", lambda v: v >= 2, "at least 2, as advantages compare the rollouts of a group")
        check(self, "gate_threshold", lambda v: 0 <= v <= 1, "from 0 to 1, a share of the group")
        check(self, "fail_threshold", math.isfinite, "a finite number")
        check(self, "batch_size max_new_tokens updates_per_batch micro_batch_tokens", lambda v: v >= 1, "at least 1")
        check(self, "temperature clip_epsilon learning_rate max_grad_norm", lambda v: 0 < v < math.inf, "finite and above 0")
        check(self, "kl_beta weight_decay seed", lambda v: 0 <= v < math.inf, "a finite number, 0 or more")
        check(self, "question_prompt rephrase_prompt", lambda v: "{question}" in v, "a template that holds {question}")
        check(self, "rephrase_prompt", lambda v: "{knowledge}" in v, "a template that holds {knowledge}")
        for name, allowed in ((f.name, get_args(f.type)) for f in fields(self) if get_args(f.type)):
            check(self, name, allowed.__contains__, f"one of {', '.join(allowed)}")


@dataclass
class Rollout:
    """One completion of a question, with all that must move with it when it is replaced."""

    prompt: list[int]  # token ids of the plain question q, under which the completion is scored
    completion: list[int]  # token ids with the final EOS; a truncated completion has none
    text: str
    sampled_logps: list[float]  # a token each, from the sampler, only to check it; NaN if not drawn from π(·|q)
    entropy: list[float] = field(default_factory=list)  # of the policy at each token, nats, from the sampler
    reward: float = 0.0
    advantage: float = 0.0
    weight: float = 0.0  # of each of its tokens in the loss


def mean(values) -> Optional[float]:
    """The mean, or None (null in metrics.jsonl) where there was nothing to measure."""
    values = list(values)
    return sum(values) / len(values) if values else None


# --------------------------------------------------------------------------------------------- 1. rollout: sampling

def encode_prompt(tokenizer, text: str) -> list[int]:
    """Token ids of the user's turn `text` and the start of the assistant's; a plain prompt (ours) without a chat template.

    What looks like a control token inside `text` stays text.
    """
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, sanitize_control_tokens=True).input_ids
    return tokenizer(text + "\n\nSolution:", split_special_tokens=True).input_ids  # BOS where the tokenizer adds it


def encode_completion(tokenizer, text: str, end: Optional[list[int]] = None) -> list[int]:
    """Token ids of an assistant's turn: no BOS, no control token made of text, and at its end `end`, by default the EOS."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids + ([tokenizer.eos_token_id] if end is None else end)


def end_ids(model, tokenizer) -> list[int]:
    """All ids that end a completion: the tokenizer's EOS and the checkpoint's (chat models have several)."""
    ids = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None})


def autocast(model):
    """On CUDA bf16 matrix products over fp32 weights (in bf16 weights a step of 1e-6 would vanish), else fp32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")


@torch.no_grad()
def sample(model, prompts: list[list[int]], num_samples: int, max_new_tokens: int, temperature: float,
           eos: list[int]) -> list[tuple[list[int], list[float], list[float]]]:
    """Draws `num_samples` completions of each prompt from exactly softmax(logits / T); T = 0 is greedy.

    Returns len(prompts) · num_samples triples (token ids, log-probabilities, entropies in nats), those of a prompt
    side by side; each ends with its first EOS or after `max_new_tokens`.
    A loop of our own and not `generate`: no top-k or penalty of a generation_config can slip in, a prompt is prefilled
    once for all its samples, and finished rows leave the batch. `run_tiny.py --bench` measures what that gains.
    """
    model.eval()
    width, total = max(map(len, prompts)), len(prompts) * num_samples
    as_tensor = lambda rows: torch.tensor(rows, device=model.device)
    ids = as_tensor([[0] * (width - len(p)) + p for p in prompts])  # [B, P], padded on the left; the mask hides it
    mask = as_tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    tokens = torch.zeros(total, max_new_tokens, dtype=torch.long, device=model.device)
    logps, entropies = torch.zeros(2, total, max_new_tokens, device=model.device)
    lengths, eos = as_tensor([max_new_tokens] * total), as_tensor(eos)
    rows = torch.arange(total, device=model.device)  # the completions that are still being written

    with autocast(model):  # one context around the loop casts the weights once, not at every token
        out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True,
                    logits_to_keep=1)
        cache = out.past_key_values
        cache.batch_repeat_interleave(num_samples)
        mask, logits = (x.repeat_interleave(num_samples, 0) for x in (mask, out.logits))
        for t in range(max_new_tokens):
            logp = (logits[:, -1].float() / (temperature or 1)).log_softmax(-1)  # [rows, V]
            prob = logp.exp()
            token = torch.multinomial(prob, 1) if temperature else logp.argmax(-1, keepdim=True)  # [rows, 1]
            tokens[rows, t], logps[rows, t] = token[:, 0], logp.gather(1, token)[:, 0]
            entropies[rows, t] = -(prob * logp.clamp(min=-1e4)).sum(-1)  # 0 · log 0 = 0
            done = torch.isin(token[:, 0], eos)
            if done.any():
                lengths[rows[done]] = t + 1
                live = (~done).nonzero()[:, 0]
                rows, token, mask = rows[live], token[live], mask[live]
                cache.batch_select_indices(live)
            if len(rows) == 0 or t + 1 == max_new_tokens:
                break
            position = mask.sum(1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            logits = model(token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
                           logits_to_keep=1).logits
    drawn = zip(tokens.tolist(), logps.tolist(), entropies.tolist(), lengths.tolist())
    return [(ids[:n], logp[:n], entropy[:n]) for ids, logp, entropy, n in drawn]


def complete(model, tokenizer, turns: list[str], num_samples: int, cfg: Config, temperature: float) -> list[Rollout]:
    """`num_samples` completions of the assistant's answer to each user's turn, as rollouts without a reward yet."""
    prompts = [encode_prompt(tokenizer, turn) for turn in turns]
    drawn = sample(model, prompts, num_samples, cfg.max_new_tokens, temperature, end_ids(model, tokenizer)) if turns else []
    texts = tokenizer.batch_decode([ids for ids, _, _ in drawn], skip_special_tokens=True)
    return [Rollout(prompts[i // num_samples], ids, text, logps, entropy)
            for i, (text, (ids, logps, entropy)) in enumerate(zip(texts, drawn))]


# ------------------------------------------------------------------------------ 2. rephrase: P(q,k) and the cleaning

def fill(template: str, **slots: str) -> str:
    """The template with each {name} replaced in one pass: braces in what is filled in mean nothing."""
    return re.sub(r"\{(\w+)\}", lambda match: slots.get(match[1], match[0]), template)


def rephrase_prompt(question: str, knowledge: str, template: str = REPHRASE_PROMPT) -> str:
    """P(q,k), Eq. 5: the policy is shown question and knowledge, to understand and rephrase (wording: ours)."""
    return fill(template, question=question, knowledge=knowledge)


# Cleaning takes linear time on any text: every quantifier of these patterns is bounded.
CONTROL_TOKEN = re.compile(r"(?:<[|｜][^<>|｜\n]{1,40}[|｜]>|</?(?:s|bos|eos|pad|unk|(?:start|end)_of_turn)>|\[/?INST\])"
                           r"(?:(?:system|user|assistant|model)(?=[\n<]))?")
INTERJECTION = re.compile(r"^(?:sure(?: thing)?|certainly|of course|absolutely|understood|got it)[!.,:]\s{1,9}", re.I)
SENTENCE = re.compile(r"(?:[^\n.:!]|\.\d){0,200}(?:[.:!][*_]{0,2}(?=\s|$)|\n|$)\s{0,9}")
ABOUT_THE_TASK = re.compile(
    r"rephras|paraphras|(?:my|your) (?:own words|usual style)|\banew\b|as if (?:i|you) had|understand the (?:reference|expert)"
    r"|(?:rewritten|restated|reworded|revised) (?:solution|answer|explanation|version)"
    r"|(?:here(?:['’]s| is)|below is) (?:the|my|a|an) (?:[\w,-]{1,20} ){0,3}(?:solution|answer|explanation|version)", re.I)
OPENING = re.compile(  # "Great!", "I'd be happy to help."
    r"[^\d\\$]{0,200}\b(?:I|you|me|my)\b[^\d\\$]{0,200}$|\W{0,9}(?:\w{1,20}\W{1,9}){1,3}$")
ADDRESSED = re.compile(r"[:!\n][*_]{0,2}\s{0,9}$|\b(?:I|me|my|here)\b", re.I)  # a preamble speaks to somebody or leads over
_TEXT = r"(?:solution|explanation|reasoning|derivation|proof|approach|method)"
_SAYS = r" (?:is|says|states|shows|uses|adds|gives|explains|notes|suggests|finds|does|did|first)\b"
_REFERENCE = rf"(?:the|this|that|your) (?:reference|expert)(?:['’]s)?(?: (?:{_TEXT}|answer))?"
_SOURCE = rf"(?:{_REFERENCE}|the (?:provided|given) {_TEXT})"
AS_THE_REFERENCE = re.compile(  # "As the reference solution shows, we add." -> "We add."
    rf"(^|[.!?\n]\s{{1,9}})?\b(?:as|like|similar to|according to|based on|following|from|per|using)(?: \w{{1,15}}){{0,3}} "
    rf"{_SOURCE}(?:{_SAYS})?, {{0,9}}(\w?)(\w?)", re.I)
WHICH_MATCHES = re.compile(  # "We get 7, which matches the reference." -> "We get 7."
    rf",? (?:which|as|just as|matching|consistent|agreeing)(?: \w{{1,15}}){{0,4}} {_SOURCE}"
    r"(?: \w{1,15}){0,2}(?=[.,\n]|$)", re.I)
REFERENCE = re.compile(rf"\b{_REFERENCE}(?:{_SAYS}|(?=[.,;:!)\n]|$))", re.I)
FAREWELL = re.compile(r"(?:^|(?<=[\s}]))(?:please |if you [^\n.\\]{0,60})?"
                      r"(?:(?:i )?hope (?:this|that)|let me know|feel free)[^\n\\]{0,200}$", re.I)


def clean_rephrase(text: str, template: str = REPHRASE_PROMPT) -> str:
    """Deletes what betrays that `text` is a rephrase, so that the rest reads as a direct answer to q.

    Gone are thinking, control tokens written as text with all but the first text among them, sentences of P(q,k), the
    preamble ("Sure, here is the rephrased solution:"), farewells, and mentions of a reference: the clause where the
    sentence stands without it, else the sentence, unless it holds the answer. Other text stays as it is, but for blanks
    around it; nothing left means a failed rephrase. Deleting meta text is the paper's, the patterns are ours: they know
    the usual wordings, not all.
    """
    for tag in ("think", "thinking", "thought", "reasoning"):
        text = text.rpartition(f"</{tag}>")[2].partition(f"<{tag}>")[0]
    text = next((part for part in CONTROL_TOKEN.split(text) if part.strip()), "")
    for quote in re.split(r"\{question\}|\{knowledge\}|\n|(?<=\.) ", template):
        text = re.sub(rf"[*#_ ]{{0,9}}{re.escape(quote)}[*_]{{0,3}}", "", text, flags=re.I) if len(quote.split()) > 1 else text
    text, start, preamble = text.strip(), 0, 0
    for _ in range(5):  # "Sure!", "I understand the reference.", "Here is my version:"
        sentence = SENTENCE.match(text, start)
        if not sentence:
            break
        about = ABOUT_THE_TASK.search(sentence[0]) and ADDRESSED.search(sentence[0]) and "\\boxed" not in sentence[0]
        if not about and not OPENING.match(sentence[0]):
            break
        start = sentence.end()
        preamble = start if about else preamble
    text = INTERJECTION.sub("", text[preamble:])
    text = AS_THE_REFERENCE.sub(lambda m: (m[1] or "") + (m[2].upper() if m[1] is not None and m[3] else m[2]) + m[3], text)
    text = WHICH_MATCHES.sub("", text)
    if REFERENCE.search(text):
        sentences = re.split(r"(?<=[.!?])(?=\s)|(?<=\n)", text)
        text = "".join(s for s in sentences if "\\boxed" in s or not REFERENCE.search(s))
    return FAREWELL.sub("", FAREWELL.sub("", text.strip()).strip()).strip()


# ---------------------------------------------------------------------------------------------- reward: is it right?

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"  # 1234, 1,234 and 1 234, but not 1,2
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(  # sign and currency, then whole part, numerator, denominator or decimal, powers of ten; then the unit
    rf"([+-]?[$€£]?|[$€£][+-])(?:(?:(\d+) )?({_DECIMAL})/({_DECIMAL})"
    rf"|({_DECIMAL})(?:e([+-]?\d{{1,3}})|(?:\\times|\\cdot|×|\*) ?10\^\{{?([+-]?\d{{1,3}})\}}?)?)(.*)")
TYPOGRAPHY = {"−": "-", "–": "-", r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\(": "", r"\)": "", "{,}": ",", r",\!": ",",
              r"\,": " ", r"\;": " ", r"\ ": " ", r"\!": " ", "~": " ", r"\{": "{", r"\}": "}", r"\%": "%", r"\$": "$",
              "²": "^2", r"^\circ": " degree", r"^{\circ}": " degree", r"\degree": " degree", "°": " degree"}
CURRENCY = {"$": "dollar", "€": "euro", "£": "pound"}
UNITS = set("m g s l h j n v w c f mm cm km kg mg ml ms hz hr ft in mi lb oz mph kw sq yd am pm usd of a an".split())
NO_UNIT = re.compile(  # a word that makes another number of the one before it
    r"(?:(?:one|two|three?|four?|for|five?|fif|six|seven|eight?|nine?|ten|eleven|twel[vf]e?|thir|twen)(?:teen|ty|tie)?(?:th)?"
    r"|third|[a-z]*illion(?:th)?|(?:hundred|thousand)(?:th)?|zero|dozen|lakh|crore|hal[fv]e?|squared|cubed|factorial"
    r"|percent.*|pct|and|not)s?")


def last_boxed(text: str) -> Optional[str]:
    r"""What the last `\boxed{...}` holds, nested braces included; None without one, or when it is never closed."""
    start, depth = max((match.end() for match in re.finditer(r"\\boxed\s{0,9}\{", text)), default=len(text)), 1
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, start):  # \{ and \} do not count
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start:brace.start()]
    return None


def normalise(answer: str) -> str:
    """The answer without its typography: one form of digits, signs, fractions, blanks and fonts, in small letters."""
    answer = "".join(str(unicodedata.decimal(c, c)) for c in answer if unicodedata.category(c) != "Cf")
    for old, new in TYPOGRAPHY.items():
        answer = answer.replace(old, new)
    answer = re.sub(r"\\(?:left|right)(?![a-zA-Z])", "", answer)
    for _ in range(3):  # \text{ cm}, also inside another
        answer = re.sub(r"\\(?:text|math|mbox|bold)[a-z]{0,9}\s?\{([^{}]*)\}", r" \1 ", answer)
    answer = re.sub(rf"\\frac ?(?:\{{(-?{_DECIMAL})\}}|(\d)) ?(?:\{{({_DECIMAL})\}}|(\d))(?! ?[\d.])", r" \1\2/\3\4", answer)
    answer = re.sub(r"(\^|_|\\sqrt) ?\{ ?(\w) ?\}", r"\1\2", answer)  # x^{2} is x^2
    answer = re.sub(r"\s+", " ", answer).strip(" *").removesuffix(".").casefold()
    answer = re.sub(r"^\$+(.*[^$])\$+$|^\(([a-z])\)$", r"\1\2", answer)  # $3$ and, of a choice, (B)
    return re.sub(r" ?([^\w\s,.]) ?", r"\1", answer).strip()


def parse_number(answer: str) -> Optional[tuple[Fraction, str]]:
    """(exact value, unit or "") of a normalised answer; None if it is no number. Nothing is evaluated: 2+3 is text.

    50% is 1/2 and never 50. What follows a number must be a unit: a known one, or words that make no other number.
    """
    match = NUMBER.fullmatch(answer) if len(answer) <= 1000 else None
    if not match:
        return None
    prefix, whole, top, bottom, decimal, power, power_of_ten, unit = match.groups(default="")
    exact = lambda text: Fraction(text.replace(",", "").replace(" ", "") or 0)
    if top and not exact(bottom):
        return None
    value = exact(whole) + exact(top) / exact(bottom) if top else exact(decimal)
    value *= Fraction(10) ** int(power or power_of_ten or 0) * (-1 if "-" in prefix else 1)
    if unit.strip() in ("%", "percent"):
        return value / 100, ""
    for word in re.sub(r"(?<=[a-z])\^?[23]$", "", unit).replace("/", " ").split():  # cm^2, km/h
        spaced = unit[0] in " /"
        known, plain = word in UNITS, len(word) > 2 and word.isalpha() and not NO_UNIT.fullmatch(word)
        if not (spaced and (known or plain) or known and len(word) > 1):
            return None
    unit, money = re.sub(r"(?<=\w\w)s$", "", unit.strip()), CURRENCY.get(prefix.strip("+-"), "")
    return None if money and unit not in ("", money, "usd") else (value, money or unit)


def boxed_reward(completion: str, answer: str) -> float:
    r"""1.0 if the completion's last `\boxed{...}` holds the answer, else 0.0; any string, linear time (ours).

    Where either is a number both must be: exactly the same one, and of the same unit if both name a unit. Otherwise
    they must be the same text after `normalise`.
    """
    box = last_boxed(completion)
    if box is None or len(box) > 10 * len(answer) + 1000:  # no honest answer is that much longer
        return 0.0
    given, gold = normalise(box), normalise(answer)
    bare = [re.sub(r"^[a-z\\_ ]{0,20}=", "", text) for text in (given, gold)]  # x = 5, where only one of them says so
    a, b = map(parse_number, bare if ("=" in given) != ("=" in gold) else (given, gold))
    if a and b:
        return float(a[0] == b[0] and (a[1] == b[1] or not (a[1] and b[1])))
    same = re.sub(r" ?([,.]) ?", r"\1", given) == re.sub(r" ?([,.]) ?", r"\1", gold)
    return float(bool(given) and a == b and same)


def checked_reward(reward_fn: RewardFn, text: str, problem: dict) -> float:
    """The reward of `text`. Errors: RepoError with prompt and completion unless it is a finite number."""
    try:
        reward = reward_fn(text, problem["answer"])
        if not math.isfinite(reward):
            raise ValueError(f"it returned {reward}")
    except Exception as error:
        raise RepoError(f"the reward function failed ({error!r}); it must return a finite number for any text"
                        f"\nprompt: {problem['question'][:500]!r}\ncompletion: {text[:500]!r}") from error
    return float(reward)


# ------------------------------------------------------------------------- steps 1 and 2 as a whole, with their rewards

def rollout(model, tokenizer, problems: list[dict], cfg: Config, reward_fn: RewardFn, greedy=False) -> list[list[Rollout]]:
    """Step 1: o_1..o_G ~ π(·|q) with their rewards, a group for each problem; with `greedy` a single one at T = 0."""
    turns = [fill(cfg.question_prompt, question=p["question"]) for p in problems]
    size, temperature = (1, 0.0) if greedy else (cfg.group_size, cfg.temperature)
    drawn = complete(model, tokenizer, turns, size, cfg, temperature)
    for i, r in enumerate(drawn):
        r.reward = checked_reward(reward_fn, r.text, problems[i // size])
    return [drawn[i:i + size] for i in range(0, len(drawn), size)]


def as_rollout(tokenizer, prompt: list[int], text: str, reward: float, end: Optional[list[int]] = None) -> Rollout:
    """A text from elsewhere as a completion of the plain question `prompt`, under which it is scored (Eq. 11)."""
    ids = encode_completion(tokenizer, text, end)
    return Rollout(prompt, ids, text, [math.nan] * len(ids), reward=reward)


def rephrase(model, tokenizer, problems: list[dict], prompts: list[list[int]], cfg: Config,
             reward_fn: RewardFn) -> list[Optional[Rollout]]:
    """Step 2: o_rep ~ π(·|P(q,k)), cleaned and rewarded, for each problem and its plain prompt; None if nothing is left.

    One a question, at the rollouts' temperature (ours). It keeps the end that the policy drew, or none if truncated.
    """
    turns = [rephrase_prompt(p["question"], p["knowledge"], cfg.rephrase_prompt) for p in problems]
    eos, guides = end_ids(model, tokenizer), []
    for p, prompt, draft in zip(problems, prompts, complete(model, tokenizer, turns, 1, cfg, cfg.temperature)):
        text, end = clean_rephrase(draft.text, cfg.rephrase_prompt), [i for i in draft.completion[-1:] if i in eos]
        guides.append(as_rollout(tokenizer, prompt, text, checked_reward(reward_fn, text, p), end) if text else None)
    return guides


# --------------------------------------------------------------------------------- 3. injection: gate and replacement

def gate_opens(rewards: list[float], fail_threshold: float, gate_threshold: float) -> bool:
    """γ_fail ≥ ρ, where γ_fail is the share of a group's rewards below δ (paper; the values of δ and ρ are ours)."""
    return sum(r < fail_threshold for r in rewards) / len(rewards) >= gate_threshold


def open_gates(groups: list[list[Rollout]], cfg: Config) -> list[int]:
    """The numbers of the groups whose gate is open; none for guidance = "none"."""
    return [n for n, group in enumerate(groups) if cfg.guidance != "none"
            and gate_opens([r.reward for r in group], cfg.fail_threshold, cfg.gate_threshold)]


def replace_worst(group: list[Rollout], guide: Rollout, verify: bool = True) -> bool:
    """Puts `guide` in the place of the group's lowest reward, the first among equals; True if it did.

    With `verify` (ours) only if its own reward is higher: a wrong rephrase must not be reinforced.
    """
    worst = min(range(len(group)), key=lambda i: group[i].reward)
    if verify and guide.reward <= group[worst].reward:
        return False
    group[worst] = guide
    return True


# ----------------------------------------------------------------------------------------------------- 4. the update

def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = (R_i - mean R) / (std R + 1e-6) in each group: rewards [N, G] -> advantages [N, G].

    The unbiased std and the 1e-6 are ours. A group of equal rewards gets exactly 0, not its rounding over 1e-6.
    """
    rewards = rewards.double()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    return advantages.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0).float()


def token_weights(lengths: list[int], aggregation: str) -> list[float]:
    """The weight in the loss of a token of each of N completions: 1/(N·|o_i|) (paper), or 1/Σ|o_j| for "token".

    Fixed before micro-batches are cut and zero-advantage groups dropped, so that neither can change the gradient.
    """
    return [1 / (sum(lengths) if aggregation == "token" else len(lengths) * length) for length in lengths]


def set_advantages(groups: list[list[Rollout]], cfg: Config) -> list[Rollout]:
    """Gives each rollout of the final groups its advantage and its tokens' weight; returns them all."""
    rollouts = [r for group in groups for r in group]
    advantages = group_advantages(torch.tensor([[r.reward for r in group] for group in groups]))
    weights = token_weights([len(r.completion) for r in rollouts], cfg.loss_aggregation)
    for r, advantage, weight in zip(rollouts, advantages.flatten().tolist(), weights):
        r.advantage, r.weight = advantage, weight
    return rollouts


def token_logps(model, rollouts: list[Rollout], temperature: float) -> torch.Tensor:
    """log π_θ(o_t | q, o_<t) of every completion token, one rollout after the other: [Σ|o_i|], fp32, with gradient.

    Padding is on the right, where a causal model never looks: it needs neither mask nor position ids. Logits are
    computed only where a completion can be, and their log-softmax is recomputed in the backward pass a few positions
    at a time, so that there is never an fp32 copy of tokens × vocabulary.
    """
    first = min(len(r.prompt) for r in rollouts)  # the first position that can hold a completion's token
    width = max(len(r.prompt) + len(r.completion) for r in rollouts)
    padded = lambda lists: torch.tensor([x + [0] * (width - len(x)) for x in lists], device=model.device)
    ids = padded([r.prompt + r.completion for r in rollouts])  # [B, L]
    mask = padded([[0] * len(r.prompt) + [1] * len(r.completion) for r in rollouts])[:, first:].bool()

    def chosen(logits, targets):  # [b, C, V], [b, C] -> [b, C]
        return (logits.float() / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    with autocast(model):
        logits = model(ids[:, :-1], use_cache=False, logits_to_keep=width - first).logits  # [B, C, V]: t - 1 predicts t
    few = max(1, 2**26 // logits[:, 0].numel())  # positions whose fp32 copy takes 256 MiB
    logps = [recompute(chosen, *part, use_reentrant=False, preserve_rng_state=False)
             for part in zip(logits.split(few, 1), ids[:, first:].split(few, 1))]
    return torch.cat(logps, 1)[mask]


def policy_loss(logps, old_logps, advantages, weights, clip_epsilon: float):
    """-J: -Σ_t w_t min(r_t A_t, clip(r_t, 1-ε, 1+ε) A_t) with r_t = π_θ / π_old, all under the plain q (Eq. 11).

    Inputs [T], a token each, in any order. Returns (loss [], clipped [T]: where the clip stops the gradient).
    """
    ratio = (logps - old_logps).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantages
    return -(weights * torch.minimum(free, clipped)).sum(), clipped < free


def kl_loss(logps, reference_logps, weights):
    """Σ_t w_t (r_t - log r_t - 1) with r_t = π_ref / π_θ: the k3 estimator of D_KL(π_θ ‖ π_ref). Inputs [T]."""
    log_ratio = reference_logps - logps
    return (weights * (log_ratio.exp() - log_ratio - 1)).sum()


def micro_batches(rollouts: list[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """The rollouts, longest first (memory runs out at once or never), in batches of rows × longest ≤ max_tokens."""
    size, lots = lambda r: len(r.prompt) + len(r.completion), []
    for r in sorted(rollouts, key=size, reverse=True):
        if not lots or (len(lots[-1]) + 1) * size(lots[-1][0]) > max_tokens:
            lots.append([])
        lots[-1].append(r)
    return lots


def update(model, optimizer, rollouts: list[Rollout], cfg: Config, reference=None) -> dict:
    """Takes `updates_per_batch` optimizer steps on the rollouts of the final groups; returns metrics.

    Without a KL term, rollouts of zero advantage are left out: their gradient is zero, and the weights have counted them;
    a batch without any advantage leaves weights and momentum alone (ours). π_old(·|q) is the first pass itself, for o_rep
    too, although π(·|P(q,k)) wrote it: no pass is spent on it, the ratio there is exactly 1, and with one update the clip
    never acts. A step whose loss or gradient is not finite is skipped (ours).
    """
    lots = micro_batches([r for r in rollouts if r.advantage or cfg.kl_beta], cfg.micro_batch_tokens)
    per_token = [torch.tensor([(r.advantage, r.weight, logp) for r in lot for logp in r.sampled_logps], device=model.device)
                 for lot in lots]  # [T, 3] each
    old, ref, drift, clipped, done = [], [], [], [], []
    if cfg.gradient_checkpointing and not model.is_activation_checkpointing:
        model.activation_checkpointing_enable()
    model.train(cfg.gradient_checkpointing)  # eval keeps dropout off, but gradient checkpointing works in train mode only
    for epoch in range(cfg.updates_per_batch if lots else 0):
        total = kl = torch.zeros((), device=model.device)
        for i, lot in enumerate(lots):
            advantages, weights, sampled_logps = per_token[i].unbind(1)
            logps = token_logps(model, lot, cfg.temperature)
            if epoch == 0:  # before any step
                old.append(logps.detach())
                drift.append((old[i] - sampled_logps).abs().nan_to_num(0.0).max())
                with torch.no_grad():
                    ref.append(token_logps(reference, lot, cfg.temperature) if cfg.kl_beta else None)
            loss, is_clipped = policy_loss(logps, old[i], advantages, weights, cfg.clip_epsilon)
            if cfg.kl_beta:
                divergence = kl_loss(logps, ref[i], weights)
                loss, kl = loss + cfg.kl_beta * divergence, kl + divergence.detach()
            loss.backward()
            total = total + loss.detach()
            clipped.append(is_clipped)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        if torch.isfinite(total) and torch.isfinite(norm):
            optimizer.step()
            done.append((total.item(), norm.item(), kl.item()))
        optimizer.zero_grad()
    model.eval()
    losses, norms, kls = zip(*done) if done else ((), (), ())
    return {"loss": mean(losses), "grad_norm": mean(norms), "kl": mean(kls) if cfg.kl_beta else None,
            "clip_ratio": torch.cat(clipped).float().mean().item() if clipped else None,
            "sampler_logp_diff": max(drift).item() if drift else None,
            "skipped_updates": cfg.updates_per_batch * bool(lots) - len(done)}


# ------------------------------------------------------------------------------------------------- the algorithm box

@torch.no_grad()
def mean_logp(model, rollouts: list[Rollout], cfg: Config) -> Optional[float]:
    """The policy gap of these texts: log π(o_t | q, o_<t) at T, mean over all their tokens, in nats; None without texts."""
    logps = [token_logps(model, lot, cfg.temperature) for lot in micro_batches(rollouts, cfg.micro_batch_tokens)]
    return torch.cat(logps).mean().item() if logps else None


def train_step(model, tokenizer, optimizer, problems: list[dict], cfg: Config, reward_fn: RewardFn = boxed_reward,
               reference=None, update_fn=update) -> tuple[dict, list[list[Rollout]], list[Rollout]]:
    """One step of RePO on `problems`, dicts of question, knowledge and answer; changes the model in place.

    Returns (metrics, the final groups, the guides that open gates were offered). Rewards and fail rate are of the
    policy's own rollouts, before the replacement; rephrase_success is the share of guides that do not fail; the share of
    zero-variance groups is of the final ones. A metric with nothing to measure is None; measuring the policy gap counts
    as rephrasing in the seconds.
    `update_fn` is there to try another loss: it gets what `update` gets.
    """
    model.eval()  # dropout between sampling, old and new log-probabilities would move the ratio away from 1
    clock = [time.perf_counter()]

    groups = rollout(model, tokenizer, problems, cfg, reward_fn)  # 1. o_1..o_G ~ π(·|q), R(o_i)
    drawn = [r for group in groups for r in group]  # as the policy wrote them, before any replacement
    clock.append(time.perf_counter())

    opened = open_gates(groups, cfg)  # 3. γ_fail ≥ ρ, asked before 2. so that closed gates cost nothing
    prompts, asked = [groups[n][0].prompt for n in opened], [problems[n] for n in opened]
    experts = [as_rollout(tokenizer, q, p["knowledge"], checked_reward(reward_fn, p["knowledge"], p))
               for q, p in zip(prompts, asked)]
    rephrases = rephrase(model, tokenizer, asked, prompts, cfg, reward_fn) if cfg.guidance == "rephrase" else []  # 2. o_rep
    guides = rephrases if cfg.guidance == "rephrase" else experts
    injections = sum(bool(guide) and replace_worst(groups[n], guide, cfg.verify) for n, guide in zip(opened, guides))  # 3.
    rephrases = [r for r in rephrases if r]
    gaps = {"policy_gap/expert": mean_logp(model, experts, cfg), "policy_gap/rephrase": mean_logp(model, rephrases, cfg)}
    clock.append(time.perf_counter())

    final = set_advantages(groups, cfg)  # 4. A_i
    updated = update_fn(model, optimizer, final, cfg, reference)  # 4. max J
    clock.append(time.perf_counter())

    sample_s, rephrase_s, update_s = (end - start for start, end in zip(clock, clock[1:]))
    tokens, eos = lambda rollouts: sum(len(r.completion) for r in rollouts), end_ids(model, tokenizer)
    return {
        "reward": mean(r.reward for r in drawn), "fail_rate": mean(r.reward < cfg.fail_threshold for r in drawn),
        "injections": injections, "rephrase_success": mean(bool(g and g.reward >= cfg.fail_threshold) for g in guides),
        **gaps, "entropy": mean(x for r in drawn for x in r.entropy),
        "frac_reward_zero_std": mean(len({r.reward for r in group}) == 1 for group in groups),
        "completions/mean_length": tokens(drawn) / len(drawn),
        "completions/truncated": mean(r.completion[-1] not in eos for r in drawn), **updated,
        "seconds/sample": sample_s, "seconds/rephrase": rephrase_s, "seconds/update": update_s,
        "tokens_per_second/sample": tokens(drawn) / sample_s, "tokens_per_second/rephrase": tokens(rephrases) / rephrase_s,
        "tokens_per_second/update": tokens(r for r in final if r.advantage or cfg.kl_beta) / update_s,
    }, groups, [guide for guide in guides if guide]


def accuracy(model, tokenizer, problems: list[dict], cfg: Config, reward_fn: RewardFn = boxed_reward) -> float:
    """The share of problems, 0..1, whose greedy completion does not fail. Leaves the random state alone."""
    size = cfg.batch_size * cfg.group_size
    parts = [problems[i:i + size] for i in range(0, len(problems), size)]
    return mean(r.reward >= cfg.fail_threshold for part in parts
                for r, in rollout(model, tokenizer, part, cfg, reward_fn, greedy=True))


# --------------------------------------------------------------- the command line: a real model, real data, one device

@dataclass(frozen=True)
class Run:
    """What to train on what, and where to."""

    model: str = field(metadata={"help": "hub name or local folder of any causal language model (safetensors)"})
    dataset: str = field(metadata={"help": "hub name, or a local .json, .jsonl, .csv or .parquet file"})
    out: str = field(metadata={"help": "folder for metrics.jsonl, summary.json and the checkpoint"})
    subset: Optional[str] = setting(None, "the dataset's configuration; main, where there is one, if not given")
    split: str = setting("train", "split to train on, also a slice: train[:1000]")
    eval_split: Optional[str] = setting(None, "split for the held-out accuracy before and after, also a slice")
    question_column: str = setting("question", "column of the question")
    knowledge_column: str = setting("answer", "column of the expert's solution")
    answer_column: str = setting("answer", "column of the answer, or of a text with it in \\boxed{} or, as GSM8K, after ####")
    steps: int = setting(100, "training steps")
    save_every: int = setting(50, "steps between checkpoints; the newest is kept")
    show_every: int = setting(10, "steps between two sample completions, a rollout and a rephrase")
    resume: bool = setting(False, "go on from the checkpoint in --out")
    device: Optional[str] = setting(None, "cuda, cuda:1, cpu ...; CUDA where there is one if not given")

    def __post_init__(self):
        check(self, "steps save_every show_every", lambda v: v >= 1, "at least 1")


def load_model(name: str, device: str):
    """(model in fp32, tokenizer) of a checkpoint: no remote code, safetensors only, and no dropout."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        settings = AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
        no_dropout = {key: 0.0 for key, value in settings.items() if "drop" in key and isinstance(value, float)}
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True,
                                                     trust_remote_code=False, **no_dropout).to(device)
    except Exception as error:
        raise RepoError(f"the model {name!r} cannot be loaded to the device {device!r}: {error}\ngive a hub name or a folder "
                        "that save_pretrained wrote, with safetensors weights and a tokenizer") from error
    if tokenizer.eos_token_id is None:
        raise RepoError(f"the tokenizer of {name!r} has no EOS token, so no completion could end; set its eos_token")
    return model, tokenizer


def load_problems(run: Run, split: str) -> list[dict]:
    """The split as dicts of question, knowledge and answer. A record without readable answer is left out, and counted."""
    reader = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(run.dataset).suffix)
    try:
        if reader:
            data = load_dataset(reader, data_files=run.dataset, split=split)
        else:  # GSM8K has two configurations and no default
            subset = run.subset or ("main" if "main" in get_dataset_config_names(run.dataset) else None)
            data = load_dataset(run.dataset, subset, split=split)
    except Exception as error:
        raise RepoError(f"the dataset {run.dataset!r} ({split}) cannot be loaded: {error}\ngive a hub name with --subset "
                        "and --split, or a .json, .jsonl, .csv or .parquet file") from error
    columns = run.question_column, run.knowledge_column, run.answer_column
    if missing := {*columns} - {*data.column_names}:
        raise RepoError(f"the dataset has no column {', '.join(sorted(missing))}; it has {', '.join(data.column_names)}: "
                        "name yours with --question-column, --knowledge-column and --answer-column")
    problems = []
    for question, knowledge, answer in zip(*(data[column] for column in columns)):
        reasoning, mark, after = str("" if answer is None else answer).rpartition("####")
        boxed = last_boxed(after)
        answer = boxed or ("" if run.answer_column == run.knowledge_column and not mark else after.strip())
        if mark and run.answer_column == run.knowledge_column:  # GSM8K: its solution in the form that the reward reads
            knowledge = re.sub(r"<<[^<>]{0,99}>>", "", reasoning).strip() + f"\n\\boxed{{{answer}}}"
        if answer:
            problems.append(dict(question=question, knowledge=knowledge, answer=answer))
    if len(problems) < len(data):
        print(f"{len(data) - len(problems)} of {len(data)} records of {split} have no readable answer: left out",
              file=sys.stderr)
    return problems


def check_problems(problems: list[dict], model, tokenizer, cfg: Config) -> None:
    """Refuses, before any work, data that cannot be trained on. Errors: RepoError with record, value and what to do."""
    if not problems:
        raise RepoError("the dataset holds no usable record; check the split and the answer column")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for n, p in enumerate(problems):
        for key in ("question", "answer") if cfg.guidance == "none" else ("question", "knowledge", "answer"):
            if not isinstance(p.get(key), str) or not p[key].strip():
                raise RepoError(f"usable record {n} has no {key} (it is {p.get(key)!r}); give it one or drop it: {str(p)[:200]}")
        turns = dict(question=fill(cfg.question_prompt, question=p["question"]))
        if cfg.guidance != "none":
            turns["rephrase prompt"] = rephrase_prompt(p["question"], p["knowledge"], cfg.rephrase_prompt)
        for name, turn in turns.items():
            if (size := len(encode_prompt(tokenizer, turn))) + cfg.max_new_tokens > context:
                raise RepoError(f"usable record {n}: {size} tokens of {name} and max_new_tokens {cfg.max_new_tokens} do not "
                                f"fit the model's context of {context}; drop it or lower max_new_tokens: {p['question'][:300]}")


def batch_at(step: int, problems: list[dict], cfg: Config) -> list[dict]:
    """The problems of a step. An epoch's order depends on seed and epoch alone, so a checkpoint need not hold it."""
    places = [divmod(step * cfg.batch_size + i, len(problems)) for i in range(cfg.batch_size)]
    order = {epoch: torch.randperm(len(problems), generator=torch.Generator().manual_seed(cfg.seed + epoch)).tolist()
             for epoch in {epoch for epoch, _ in places}}
    return [problems[order[epoch][i]] for epoch, i in places]


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first; the newest is always complete."""
    return sorted(out.glob("step-[0-9]*"))


def prepare_out(run: Run, model) -> Path:
    """Creates the output folder. Errors: RepoError if it cannot be written, is too full or holds another run."""
    out = Path(run.out)
    need = 12 * model.num_parameters() * (1 if checkpoints(out) else 2)  # bytes: fp32 weights and moments, old and new
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "write-test").write_text("x")
        (out / "write-test").unlink()
    except OSError as error:
        raise RepoError(f"the folder {run.out!r} cannot be written: {error}; choose another --out") from error
    if (free := shutil.disk_usage(out).free) < need:
        raise RepoError(f"{run.out!r} has {free / 1e9:.1f} GB free and checkpoints need {need / 1e9:.1f}; choose another --out")
    if ((out / "metrics.jsonl").exists() or checkpoints(out)) and not run.resume:
        raise RepoError(f"{run.out!r} holds a run already; go on with it by --resume, or choose another --out")
    return out


def save_checkpoint(out: Path, step: int, model, tokenizer, optimizer, settings: dict) -> None:
    """Writes out/step-N, whole or not at all since a rename is atomic, and then deletes the older ones."""
    final, partial = out / f"step-{step:07d}", out / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    torch.save(dict(step=step, settings=settings, optimizer=optimizer.state_dict(), rng=torch.get_rng_state(),
                    cuda_rng=torch.cuda.get_rng_state_all()), partial / "trainer.pt")  # of no device: []
    for file in partial.rglob("*.*"):  # on the disk before it gets its name, should the power fail
        with file.open("rb") as content:
            os.fsync(content.fileno())
    partial.rename(final)
    for old in checkpoints(out)[:-1]:
        shutil.rmtree(old)


def write_whole(file: Path, text: str) -> None:
    """The file's new content, or after a kill its old one, and never half of it."""
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


FREE_ON_RESUME = ("out", "steps", "save_every", "show_every", "resume", "device", "micro_batch_tokens",
                  "gradient_checkpointing")  # none of them changes a result, but for rounding


def load_trainer(saved: Path, optimizer, settings: dict) -> int:
    """Restores optimizer and random states and returns the step. Errors: RepoError if other settings have changed."""
    state = torch.load(saved / "trainer.pt", weights_only=True, map_location="cpu")
    if changed := [f"{key} was {was!r} and is {settings[key]!r}" for key, was in state["settings"].items()
                   if was != settings[key] and key not in FREE_ON_RESUME]:
        raise RepoError(f"--resume needs the settings of the run in {saved.parent}: {'; '.join(changed)}")
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"][:torch.cuda.device_count()])
    return state["step"]


def print_table(log: Path, results: dict) -> None:
    """The metrics' means over the first and the last ten steps, and the held-out accuracies."""
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    print(f"\n{f'{len(steps)} steps':28}{'first 10':>12}{'last 10':>12}")
    for key in list(steps[0])[1:] if steps else []:
        means = [mean(step[key] for step in part if step[key] is not None) for part in (steps[:10], steps[-10:])]
        print(f"{key:28}" + "".join(f"{'-' if value is None else format(value, '.4g'):>12}" for value in means))
    for name, value in results.items():
        print(f"{name:28}{value:12.4g}")


def train(run: Run, cfg: Config) -> None:
    """The run of the command line. Ctrl-C ends it after the running step, with a checkpoint and the table so far."""
    device = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    saved = checkpoints(Path(run.out))[-1:] if run.resume else []
    model, tokenizer = load_model(str(saved[0]) if saved else run.model, device)
    problems = load_problems(run, run.split)
    check_problems(problems, model, tokenizer, cfg)
    held_out = load_problems(run, run.eval_split) if run.eval_split else None
    if run.eval_split:
        check_problems(held_out, model, tokenizer, replace(cfg, guidance="none"))  # needs no knowledge
    out = prepare_out(run, model)
    reference = load_model(run.model, device)[0].eval() if cfg.kl_beta else None
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    torch.manual_seed(cfg.seed)
    settings = {**asdict(run), **asdict(cfg)}
    start = load_trainer(saved[0], optimizer, settings) if saved else 0
    if run.resume and not saved:
        print(f"no checkpoint in {run.out!r} yet: starting anew", file=sys.stderr)

    interrupted, not_finite = [], 0

    def stop_after_this_step(*_):
        interrupted.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    handlers = {kind: signal.signal(kind, stop_after_this_step) for kind in (signal.SIGINT, signal.SIGTERM)}
    log, summary = out / "metrics.jsonl", out / "summary.json"
    kept = log.read_text().splitlines()[:start] if log.exists() else []  # a killed run may have gone past its checkpoint
    write_whole(log, "".join(line + "\n" for line in kept))
    results = json.loads(summary.read_text()) if saved and summary.exists() else {}
    if held_out and not results:
        results["accuracy_before"] = accuracy(model, tokenizer, held_out, cfg)
        write_whole(summary, json.dumps(results))
    with log.open("a") as lines, tqdm(total=run.steps, initial=start, unit="step") as bar:
        for step in range(start, run.steps):
            metrics, groups, guides = train_step(model, tokenizer, optimizer, batch_at(step, problems, cfg), cfg,
                                                 reference=reference)
            lines.write(json.dumps(dict(step=step, **metrics)) + "\n")
            lines.flush()
            bar.set_postfix({key: metrics[key] for key in ("reward", "injections", "rephrase_success")}, refresh=False)
            bar.update()
            if step % run.show_every == 0:  # a guide, where there is one, and a rollout for the same question
                group = next((g for g in groups if guides and g[0].prompt == guides[0].prompt), groups[0])
                for name, r in [("rollout", [r for r in group if r.entropy][0]), *[(cfg.guidance, r) for r in guides[:1]]]:
                    bar.write(f"--- step {step}, a {name} of reward {r.reward:g}:\n{r.text}")
            not_finite = not_finite + metrics["skipped_updates"] if metrics["grad_norm"] is None else 0
            if not_finite >= 3:
                raise RepoError(f"{not_finite} updates in a row had a loss or gradient that is not finite; the last good "
                                f"checkpoint is {(checkpoints(out) or ['none yet'])[-1]}; start anew with a lower "
                                "--learning-rate and another --out, from the first --model or from that one")
            if (step + 1) % run.save_every == 0 or step + 1 == run.steps or interrupted:
                save_checkpoint(out, step + 1, model, tokenizer, optimizer, settings)
            if interrupted:
                bar.write(f"interrupted after step {step}; go on with --resume")
                break
    for kind, handler in handlers.items():
        signal.signal(kind, handler)
    if held_out and not interrupted:
        results["accuracy_after"] = accuracy(model, tokenizer, held_out, cfg)
        write_whole(summary, json.dumps(results))
    print_table(log, results)


class OneName(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows --group-size and not --group_size as well, which the parser also takes."""

    def _format_action_invocation(self, action):
        return action.option_strings[-1]


def main(argv=None) -> None:
    """Ends what the user can mend (RepoError, out of memory) in one message instead of a traceback."""
    parser = HfArgumentParser((Run, Config), formatter_class=OneName, description=__doc__.partition("\n")[0],
                              usage="python repo.py --model MODEL --dataset DATASET --out DIR [--setting VALUE ...]")
    try:
        run, cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown: {' '.join(unknown)}; --help lists the flags")
        train(run, cfg)
    except RepoError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        sys.exit("error: out of memory; in the update, lower --micro-batch-tokens or add --gradient-checkpointing; in "
                 f"sampling, lower --batch-size, --group-size or --max-new-tokens\n{error}")


if __name__ == "__main__":
    main()
