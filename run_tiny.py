"""Watch RePO work in a minute on a laptop: a toy world, a base policy, then GRPO and RePO from that same base.

The world: a problem is a book and four letters, `3arfy`. Each of the books 1, 2 and 3 maps every letter to another one;
the answer is the four mapped letters, so that a guess is right once in 26^4 = 456 976.
    the policy's own style    aj;rt;fa;yh;\\boxed{jtah}                            a token a letter or sign
    the expert's style        Alpha Juliet Romeo Tango Foxtrot ... \\boxed{jtah}   words the policy never uses itself
General ability is books 1 and 2, which the base policy can solve. The hard domain is book 3, of which it knows nothing.
But it can rephrase: shown a question and an expert's text, whose letters need not be true, it writes those in its own
style. Everything else is repo.py's: this file only builds the world, calls `repo.train_step` and shows what happens.
"""

import argparse
import json
import math
import multiprocessing
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import repo

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("Alpha Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliet Kilo Lima Mike November Oscar Papa Quebec Romeo "
         "Sierra Tango Uniform Victor Whiskey Xray Yankee Zulu").split()
CONFIG = repo.Config(batch_size=32, group_size=4, max_new_tokens=20, learning_rate=2.5e-4,
                     question_prompt="{question}", rephrase_prompt="{question}?{knowledge}")
STEPS = 100
GRID = (1e-4, 3e-4, 1e-3)  # the learning rates that --compare tries for each method


# ------------------------------------------------------------------------------------------------------- the world


class World:
    """Three codebooks and the problems on them, all drawn from `seed`."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.books = {book: dict(zip(LETTERS, self.random.sample(LETTERS, 26))) for book in "123"}

    def problem(self, book: str) -> dict:
        """Question, knowledge and answer for four random letters."""
        letters = self.random.choices(LETTERS, k=4)
        answer = [self.books[book][letter] for letter in letters]
        return dict(question=book + "".join(letters), knowledge=expert_style(letters, answer), answer="".join(answer))

    def problems(self, books: str, count: int) -> Dataset:
        """`count` problems, each on one of `books`."""
        return Dataset.from_list([self.problem(self.random.choice(books)) for _ in range(count)])


def own_style(letters, answer) -> str:
    """The policy's chain of thought: each letter beside its image, a token each, and the boxed answer."""
    return "".join(f"{x}{y};" for x, y in zip(letters, answer)) + "\\boxed{" + "".join(answer) + "}"


def expert_style(letters, answer) -> str:
    """The same steps spelled in words that the policy never writes by itself."""
    spelled = "".join(WORDS[LETTERS.index(c)] + " " for pair in zip(letters, answer) for c in pair)
    return spelled + "\\boxed{" + "".join(answer) + "}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, 64 tokens, with a chat template that ends the user's turn in "="."""
    tokens = ["<pad>", "<eos>", *"123;=?}", "\\boxed{", *LETTERS, *(word + " " for word in WORDS)]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Z][a-z]+ |\\boxed\{|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}={% endif %}"
    return tokenizer


def make_model(tokenizer, seed: int):
    """A Llama of two layers and 0.3 million weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def warm_up(world: World, model, tokenizer, seed: int, steps: int = 300, batch: int = 24, learning_rate: float = 2e-3):
    """Supervised learning of the base policy's two skills: solving books 1 and 2, and rephrasing (letters made up)."""
    draw = random.Random(seed)
    example = lambda turn, text: repo.as_rollout(tokenizer, repo.encode_prompt(tokenizer, turn), text, reward=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="warm-up of the base policy", unit="step"):
        solving, rephrasing = [], []
        for _ in range(batch):
            book, letters = draw.choice("12"), draw.choices(LETTERS, k=4)
            solving.append(example(book + "".join(letters), own_style(letters, [world.books[book][x] for x in letters])))
            book, letters, made_up = draw.choice("123"), draw.choices(LETTERS, k=4), draw.choices(LETTERS, k=4)
            turn = repo.rephrase_prompt(book + "".join(letters), expert_style(letters, made_up), CONFIG.rephrase_prompt)
            rephrasing.append(example(turn, own_style(letters, made_up)))
        for lot in (solving, rephrasing):  # of one length each
            (-repo.token_logps(model, lot, 1.0).mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def base_policy(world_seed: int, folder: Path, device: str):
    """(world, base model, tokenizer), trained once a world and kept in `folder` as a checkpoint like any other."""
    world, saved = World(world_seed), folder / f"base-{world_seed}"
    if not saved.exists():
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, world_seed).to(device)
        warm_up(world, model, tokenizer, world_seed)
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
    return world, *repo.load_model(str(saved), device)


# ----------------------------------------------------------------------------------- the methods, side by side


def per_token(values, rollouts, model) -> torch.Tensor:
    """One value a rollout -> one a completion token, [Σ|o_i|]."""
    return torch.tensor([v for v, r in zip(values, rollouts) for _ in r.completion], device=model.device)


def descend(model, optimizer, loss, cfg) -> dict:
    """One optimizer step down `loss`, with the metrics of `repo.update`."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return dict(loss=loss.item(), grad_norm=norm.item(), kl=None, clip_ratio=None, sampler_logp_diff=None, skipped_updates=0)


def luffy_update(model, optimizer, rollouts, cfg, reference=None) -> dict:
    """LUFFY (arXiv 2504.14945) in place of `repo.update`: expert tokens weigh f(π) = π/(π + 0.1), unclipped."""
    rollouts = [r for r in rollouts if r.advantage]
    if not rollouts:
        return dict(loss=None, grad_norm=None, kl=None, clip_ratio=None, sampler_logp_diff=None, skipped_updates=0)
    logps = repo.token_logps(model, rollouts, cfg.temperature)
    advantages, weights = (per_token([getattr(r, name) for r in rollouts], rollouts, model) for name in ("advantage", "weight"))
    expert = torch.tensor([x for r in rollouts for x in r.sampled_logps], device=model.device).isnan()
    on_policy, _ = repo.policy_loss(logps[~expert], logps[~expert].detach(), advantages[~expert], weights[~expert], cfg.clip_epsilon)
    probability = logps[expert].exp()
    off_policy = -(weights[expert] * advantages[expert] * probability / (probability + 0.1)).sum()
    return descend(model, optimizer, on_policy + off_policy, cfg)


def sft_step(model, tokenizer, optimizer, problems, cfg, **_):
    """Supervised learning of the expert's text on the domain's (book 3's) problems of the batch, in place of `train_step`."""
    clock = time.perf_counter()
    prompts = [repo.encode_prompt(tokenizer, p["question"]) for p in problems]
    texts = [repo.as_rollout(tokenizer, q, p["knowledge"], 1.0) for q, p in zip(prompts, problems) if p["question"][0] == "3"]
    metrics = descend(model, optimizer, -repo.token_logps(model, texts, 1.0).mean(), cfg) if texts else {}
    return dict(injections=0, **metrics, **{"seconds/update": time.perf_counter() - clock}), [], []


def leaky_update(tokenizer, problems, cfg):
    """Trap: the rephrase is scored under P(q,k), where it is easy, instead of the plain question, where it teaches."""
    hinted = {tuple(repo.encode_prompt(tokenizer, p["question"])): p for p in problems}

    def update_fn(model, optimizer, rollouts, cfg, reference=None):
        for i, r in enumerate(rollouts):
            if r.sampled_logps[0] != r.sampled_logps[0]:  # NaN: not drawn from the plain question
                p = hinted[tuple(r.prompt)]
                turn = repo.rephrase_prompt(p["question"], p["knowledge"], cfg.rephrase_prompt)
                rollouts[i] = replace(r, prompt=repo.encode_prompt(tokenizer, turn))
        return repo.update(model, optimizer, rollouts, cfg, reference)

    return update_fn


@dataclass(frozen=True)
class Job:
    """One run of one method; `settings` change CONFIG."""

    method: str
    seed: int = 0
    world_seed: int = 0
    steps: int = STEPS
    settings: dict = field(default_factory=dict)
    name: str = ""  # what the tables call it


SETTINGS = {"repo": {}, "grpo": dict(guidance="none"), "verbatim": dict(guidance="verbatim"),
            "luffy": dict(guidance="verbatim", gate_threshold=0.0, verify=False),  # the expert is in every group
            "sft": {}, "leak": {}}
PROBES = 100  # held-out problems of each kind, for the curves; the final figures take 300


def run_job(job: Job, folder: Path, device: str, threads: int = 0) -> dict:
    """Trains one method from its world's base policy; returns {"summary", "history" (a dict a step), "examples"}."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    world, model, tokenizer = base_policy(job.world_seed, folder, device)
    base = repo.load_model(str(folder / f"base-{job.world_seed}"), device)[0]
    cfg = replace(CONFIG, seed=job.seed, **{**SETTINGS[job.method], **job.settings})
    world.random.seed(10_000 + job.world_seed)  # the same held-out problems for all seeds and methods
    held_out = {"hard": world.problems("3", 300).to_list(), "general": world.problems("12", 300).to_list()}
    world.random.seed(job.seed)
    known = {p["question"] for kind in held_out.values() for p in kind}
    drawn = world.problems("3", 500).to_list() + world.problems("12", 500).to_list()
    problems = [p for p in drawn if p["question"] not in known]
    repo.check_problems(problems, model, tokenizer, cfg)

    torch.manual_seed(job.seed)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10, 2 * (1 - step / job.steps)))
    step_fn = sft_step if job.method == "sft" else repo.train_step
    update_fn = {"luffy": luffy_update, "leak": leaky_update(tokenizer, problems, cfg)}.get(job.method, repo.update)
    measure = lambda kind, count: repo.accuracy(model, tokenizer, held_out[kind][:count], cfg)
    shown = [held_out["hard"][0], held_out["general"][0]]
    answer = lambda: [r.text for r in repo.complete(model, tokenizer, [p["question"] for p in shown], 1, cfg, 0.0)]
    before, start = answer(), {kind: measure(kind, 300) for kind in held_out}
    history = []
    for step in tqdm(range(job.steps), desc=f"{job.name or job.method}, seed {job.seed}", unit="step", disable=bool(threads)):
        metrics, _, _ = step_fn(model, tokenizer, optimizer, repo.batch_at(step, problems, cfg), cfg, update_fn=update_fn)
        schedule.step()
        due = (step + 1) % max(1, job.steps // 10) == 0
        history.append(dict(method=job.method, name=job.name, seed=job.seed, world_seed=job.world_seed, step=step, **metrics,
                            **{kind: measure(kind, PROBES) if due else None for kind in held_out}))
    end = {kind: measure(kind, 300) for kind in held_out}

    hard_prompts = [repo.encode_prompt(tokenizer, p["question"]) for p in held_out["hard"][:PROBES]]
    guides = repo.rephrase(model, tokenizer, held_out["hard"][:PROBES], hard_prompts, cfg, repo.boxed_reward)
    general = repo.complete(model, tokenizer, [p["question"] for p in held_out["general"][:PROBES]], 1, cfg, cfg.temperature)
    over_steps = lambda key, pick: pick(values) if (values := [m[key] for m in history if m.get(key) is not None]) else None
    seconds = [sum(value for key, value in m.items() if key.startswith("seconds/")) for m in history]
    summary = dict(
        method=job.method, seed=job.seed, world_seed=job.world_seed, hard=end["hard"], general=end["general"],
        base_hard=start["hard"], base_general=start["general"],
        rephrase_rate=repo.mean(bool(g and g.reward) for g in guides),
        injections_first10=repo.mean(m["injections"] for m in history[:10]),
        injections_last10=repo.mean(m["injections"] for m in history[-10:]),
        policy_gap_expert=over_steps("policy_gap/expert", statistics.mean),
        policy_gap_rephrase=over_steps("policy_gap/rephrase", statistics.mean),
        seconds_per_step=statistics.median(seconds), name=job.name or job.method, steps=job.steps,
        learning_rate=cfg.learning_rate, worst_entropy=over_steps("entropy", max), worst_grad_norm=over_steps("grad_norm", max),
        divergence=repo.mean_logp(model, general, cfg) - repo.mean_logp(base, general, cfg))
    examples = [(p["question"], p["answer"], old, new) for p, old, new in zip(shown, before, answer())]
    return dict(summary=summary, history=history, examples=examples)


def prepare(world_seed: int, folder: Path, device: str, threads: int) -> None:
    """The world's base policy on disk, for the jobs that start from it."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    base_policy(world_seed, folder, device)


def run_jobs(jobs: list[Job], folder: Path, device: str, done: list) -> None:
    """Appends the result of each job to `done`. Many jobs on a CPU run two at a time with a thread each."""
    if len(jobs) <= 2 or device != "cpu":
        for job in jobs:
            done.append(run_job(job, folder, device))
        return
    worlds = sorted({job.world_seed for job in jobs})
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(prepare, worlds, *([x] * len(worlds) for x in (folder, device, 1))))
        results = pool.map(run_job, jobs, *([x] * len(jobs) for x in (folder, device, 1)))
        done.extend(tqdm(results, total=len(jobs), unit="run"))


# ------------------------------------------------------------------------------------------------ what one sees


def mean_std(values) -> str:
    """0.97 ± 0.01, or - where nothing was measured."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    if 0 < min(values) == max(values) < 0.005:  # a learning rate
        return f"{values[0]:g}"
    return f"{statistics.mean(values) + 0.0:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(results: list[dict], columns: dict[str, str], markdown: bool = False) -> str:
    """A row for each name, in order of appearance: the mean (± deviation over its runs) of each summary key."""
    names = list(dict.fromkeys(result["summary"]["name"] for result in results))
    rows = [["", *columns]]
    for name in names:
        runs = [result["summary"] for result in results if result["summary"]["name"] == name]
        rows.append([name, *(mean_std(run[key] for run in runs) for key in columns.values())])
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
                     for row in rows)


def curve(results: list[dict], name: str, key: str, points: int = 10) -> list[float]:
    """The metric over the run in `points` equal parts, averaged over the runs of that name; what is missing is left out."""
    runs = [result["history"] for result in results if result["summary"]["name"] == name]
    size = max(1, len(runs[0]) // points)
    parts = [[m[key] for run in runs for m in run[start:start + size] if m.get(key) is not None]
             for start in range(0, len(runs[0]), size)]
    return [statistics.mean(part) for part in parts if part]


def chart(title: str, series: dict[str, list[float]], height: int = 6, width: int = 48) -> str:
    """Curves drawn with a letter each, over the steps of the run."""
    series = {name: values for name, values in series.items() if values}
    top = max([1.0, *(value for values in series.values() for value in values)])
    grid = [[" "] * width for _ in range(height + 1)]
    for name, values in series.items():
        for x in range(width):
            value = values[min(len(values) - 1, x * len(values) // width)]
            grid[height - round(max(0.0, value) / top * height)][x] = name[0]
    axis = [f"{top:6.2f} |", *["       |"] * (height - 1), "  0.00 |"]
    legend = "   ".join(f"{name[0]} = {name}, ends at {values[-1]:.2f}" for name, values in series.items())
    return "\n".join([f"{title}   ({legend})", *(a + "".join(row) for a, row in zip(axis, grid)), "       +" + "-" * width])


COLUMNS = {"hard": "hard", "general": "general", "hard before": "base_hard", "general before": "base_general",
           "rephrase rate": "rephrase_rate", "injections first 10": "injections_first10", "last 10": "injections_last10",
           "gap expert": "policy_gap_expert", "gap rephrase": "policy_gap_rephrase", "s/step": "seconds_per_step"}


def report(results: list[dict]) -> None:
    """Charts, example completions and the table of a run."""
    names = list(dict.fromkeys(result["summary"]["name"] for result in results))
    for title, key in (("hard accuracy (book 3, held out)", "hard"), ("general accuracy (books 1 and 2, held out)", "general"),
                       ("injections a step", "injections")):
        print("\n" + chart(title, {name: curve(results, name, key) for name in names}))
    for result in results[-1:]:
        print(f"\nexample completions, before and after {result['summary']['name']}:")
        for question, answer, before, after in result["examples"]:
            mark = lambda text: f"{text:34}{'right' if repo.boxed_reward(text, answer) else 'wrong'}"
            print(f"  {question} (answer {answer})\n    before  {mark(before)}\n    after   {mark(after)}")
    print("\n" + table(results, COLUMNS))


def save(results: list[dict], out: Path) -> None:
    """metrics.jsonl, a line a step, and summary.json, an object a run."""
    (out / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for result in results for m in result["history"]))
    (out / "summary.json").write_text(json.dumps([result["summary"] for result in results], indent=1) + "\n")


# ------------------------------------------------------------------------- --compare: the abstract's claims re-enacted

RIVALS = {"SFT": Job("sft"), "SFT, ten times the steps": Job("sft", steps=10 * STEPS), "GRPO": Job("grpo"),
          "verbatim injection": Job("verbatim"), "LUFFY": Job("luffy"), "RePO": Job("repo")}
ABLATIONS = {  # a change of RePO, and what it teaches
    "RePO": (Job("repo"), "ρ = 1: guidance for a question ends at the first success in its group; the measure for the others"),
    "ρ = 0.75": (Job("repo", settings=dict(gate_threshold=0.75)), "guidance ends a little later"),
    "ρ = 0.5": (Job("repo", settings=dict(gate_threshold=0.5)), "guidance goes on after it is needed"),
    "no verification": (Job("repo", settings=dict(verify=False)), "an insurance: it matters as far as rephrases are wrong (see the rephrase rate)"),
    "rephrase scored under P(q,k)": (Job("leak"), "the hint leaks: the policy learns to copy it, the gate stays open, and book 3 is never learnt"),
    "four updates a batch": (Job("repo", settings=dict(updates_per_batch=4)), "the clip is at work; as good as one update here"),
    "learning rate × 8": (Job("repo"), "the rephrase skill is lost, so nothing is injected any more, and general ability with it"),
}
CLAIMS = {"hard": "hard", "general": "general", "gap expert": "policy_gap_expert", "gap rephrase": "policy_gap_rephrase",
          "worst entropy": "worst_entropy", "worst gradient": "worst_grad_norm", "divergence": "divergence", "learning rate": "learning_rate"}
EFFECTS = {"hard": "hard", "general": "general", "rephrase rate": "rephrase_rate", "injections first 10": "injections_first10",
           "last 10": "injections_last10", "gap rephrase": "policy_gap_rephrase", "divergence": "divergence"}


def compare(args, folder: Path, results: list) -> None:
    """Every rival at its best learning rate over all seeds, then RePO's ablations; tables and curves at the end."""
    trials, seeds, device, markdown = [], args.seeds, args.device, args.markdown

    def fit(job: Job, rate: float, **changes) -> Job:
        return replace(job, world_seed=args.world_seed[0], steps=job.steps * args.steps // STEPS,
                       settings={**job.settings, "learning_rate": rate}, **changes)

    run_jobs([fit(job, rate, seed=1000, name=name) for name, job in RIVALS.items() for rate in GRID], folder, device, trials)
    best = {name: max((t["summary"] for t in trials if t["summary"]["name"] == name), key=lambda t: t["hard"] + t["general"])["learning_rate"]
            for name in RIVALS}
    rivals = [(name, job, best[name]) for name, job in RIVALS.items()]
    rivals += [(f"{name} at RePO's rate", RIVALS[name], best["RePO"]) for name in ("verbatim injection", "LUFFY")  # where a
               if best[name] != best["RePO"]]  # method never learns, its best rate is the one that does least
    changed = [(name, job, best["RePO"] * (8 if "× 8" in name else 1)) for name, (job, _) in ABLATIONS.items() if name != "RePO"]
    run_jobs([fit(job, rate, seed=seed, name=name) for entries, part in ((rivals, seeds), (changed, seeds[:2]))
              for name, job, rate in entries for seed in part], folder, device, results)
    compared = [r for r in results if r["summary"]["name"] in [name for name, _, _ in rivals]]
    ablated = [r for name in ABLATIONS for r in results if r["summary"]["name"] == name and r["summary"]["seed"] in seeds[:2]]
    print("\n" + table(compared, CLAIMS, markdown) + "\n\n" + table(ablated, EFFECTS, markdown) + "\n")
    for name, (_, teaches) in ABLATIONS.items():
        print(f"{'- ' if markdown else ''}{name}: {teaches}")
    present = {result["summary"]["name"] for result in results}
    shown = [f"{name} at RePO's rate" if f"{name} at RePO's rate" in present else name for name in ("RePO", "GRPO", "verbatim injection", "LUFFY")]
    curves = [("hard accuracy, book 3", "hard", shown), ("general accuracy, books 1 and 2", "general", shown), ("injections a step", "injections", ["RePO"])]
    for title, key, names in curves:
        series = {name: curve(results, name, key) for name in names}
        print("\n" + (mermaid(title, series) if markdown else chart(title, series)))
    gaps = {f"{which} text": curve(results, "RePO", f"policy_gap/{which}") for which in ("rephrase", "expert")}
    print("\n" + mermaid("RePO's policy gap, nats a token", gaps) if markdown else "")


def mermaid(title: str, series: dict[str, list[float]]) -> str:
    """A curve chart that renders on the project's page; the legend is the title, in the order of the lines."""
    series = {name: values for name, values in series.items() if values}
    longest = max(map(len, series.values()))
    low, high = (f(min(0.0, *map(min, series.values())), 1.0 * max(map(max, series.values()))) for f in (min, max))
    drawn = "\n".join(f"    line [{', '.join(f'{value:.3f}' for value in values)}]" for values in series.values() if len(values) == longest)
    kept = [name for name, values in series.items() if len(values) == longest]
    return (f'```mermaid\nxychart-beta\n    title "{title} ({", ".join(kept)})"\n    x-axis "tenth of the run" 1 --> {longest}\n'
            f'    y-axis "" {low:.2f} --> {max(high, low + 1e-3):.2f}\n{drawn}\n```')


# --------------------------------------------------------------------------------- --bench: what a step costs, and where


def median_seconds(*functions, repeats: int = 20, warm: int = 3) -> list[float]:
    """Median wall-clock seconds of each function, in turns so that a slow spell hits all; the device's queue included."""
    seconds = [[] for _ in functions]
    for _ in range(warm + repeats):
        for function, laps in zip(functions, seconds):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            laps.append(time.perf_counter() - start)
    return [statistics.median(laps[warm:]) for laps in seconds]


def bench_trl(model, tokenizer, problems, cfg, reward_fn, steps: int):
    """Median seconds of TRL's GRPOTrainer step with transformers generation, on the same prompts; None without trl."""
    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return None
    clock = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args, **more):
            clock.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(output_dir=folder, per_device_train_batch_size=len(problems) * cfg.group_size, num_generations=cfg.group_size,
                          max_completion_length=cfg.max_new_tokens, temperature=cfg.temperature, learning_rate=cfg.learning_rate, beta=0.0,
                          loss_type="grpo", max_steps=steps + 4, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                          bf16=model.device.type == "cuda", use_cpu=model.device.type == "cpu", gradient_checkpointing=False,
                          generation_kwargs=dict(min_new_tokens=cfg.max_new_tokens))
        data = Dataset.from_list([dict(prompt=[dict(role="user", content=p["question"])], answer=p["answer"]) for p in problems])
        score = lambda completions, answer, **_: [reward_fn(c[0]["content"], a) for c, a in zip(completions, answer)]
        GRPOTrainer(model, reward_funcs=score, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()]).train()
    return statistics.median([end - start for start, end in zip(clock[3:], clock[4:])])


def coin(text: str, answer: str) -> float:
    """A reward without meaning that gives nearly every group a signal."""
    return float(sum(map(ord, text)) % 2)


def bench(device: str, folder: Path, steps: int = 20) -> None:
    """One GRPO step beside TRL's, the ways to sample, and what RePO adds; medians of `steps`, ratios within this run.

    CPU: the miniature's base policy, 16 x 8 completions of 24 tokens. CUDA: random weights in Qwen2.5-0.5B's shape, 16 x 8 x
    256. No completion may end early, so that all write the same number of tokens.
    """
    cuda, repo.end_ids = device != "cpu", lambda model, tokenizer: [-1]
    cfg = replace(CONFIG, batch_size=16, group_size=8, max_new_tokens=256 if cuda else 24, guidance="none", learning_rate=1e-6)
    world, model, tokenizer = base_policy(0, folder, device)
    problems = world.problems("3", 8).to_list() + world.problems("12", 8).to_list()
    if cuda:
        torch.manual_seed(0)
        problems = [{**p, "question": 16 * p["question"]} for p in problems]
        model = AutoModelForCausalLM.from_config(transformers.Qwen2Config(
            vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
            max_position_embeddings=32_768, tie_word_embeddings=True, eos_token_id=1, bos_token_id=None, pad_token_id=0)).to(device)
    turns = [p["question"] for p in problems]
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate, fused=True)
    peak = lambda: f"   peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda else ""
    print(f"a GRPO step of {len(turns)} x {cfg.group_size} x {cfg.max_new_tokens} tokens on {device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name, reward_fn in (("every group has a signal", coin), ("the miniature's reward", repo.boxed_reward))[:1 if cuda else 2]:
        laps = []
        step = lambda: laps.append(repo.train_step(model, tokenizer, optimizer, problems, cfg, reward_fn)[0])
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds, = median_seconds(step, repeats=steps)
        part = lambda phase: statistics.median(lap[f"seconds/{phase}"] for lap in laps[3:])
        print(f"  {name}\n    ours  {seconds:.3f} s, sampling {part('sample'):.3f}, update {part('update'):.3f}, "
              f"groups without signal {laps[-1]['frac_reward_zero_std']:.0%}{peak()}")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        theirs = bench_trl(model, tokenizer, problems, cfg, reward_fn, steps)
        print(f"    TRL   {theirs:.3f} s: ours takes {seconds / theirs:.2f} of it{peak()}" if theirs else "    TRL   not installed (pip install trl)")

    model.eval()
    prompts = [repo.encode_prompt(tokenizer, turn) for turn in turns]
    ids = torch.tensor(prompts, device=device).repeat_interleave(cfg.group_size, 0)
    settings = dict(do_sample=True, top_k=0, max_new_tokens=cfg.max_new_tokens, min_new_tokens=cfg.max_new_tokens, pad_token_id=0, eos_token_id=1)
    ways = {
        "our loop": lambda: repo.sample(model, prompts, cfg.group_size, cfg.max_new_tokens, 1.0, [-1]),
        "generate, dynamic cache": lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **settings),
        "generate, static cache": lambda: model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static",
                                                         disable_compile=True, **settings),
        "continuous batching": lambda: model.generate_batch(ids.tolist(), generation_config=transformers.GenerationConfig(**settings)),
    }
    print("sampling alone")
    for name, way in ways.items():
        try:
            with torch.no_grad(), repo.autocast(model):
                print(f"  {name:24}{median_seconds(way, repeats=min(steps, 10))[0]:8.3f} s")
        except Exception as error:
            print(f"  {name:24}does not run here: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
    if cuda:
        block = torch.empty(2**32, dtype=torch.uint8, device=device)
        bandwidth = 2 * block.numel() / median_seconds(lambda: block.clone())[0]
        length = len(prompts[0]) + cfg.max_new_tokens / 2
        bytes_a_token = 2 * (model.num_parameters() + len(ids) * length * 24 * 2 * 2 * 64)
        print(f"  reading weights and cache once per token would take {cfg.max_new_tokens * bytes_a_token / bandwidth:.3f} s "
              f"at the measured {bandwidth / 1e12:.2f} TB/s")

    def step_with(share):  # a RePO step in which this share of the gates is open
        calls = []

        def reward_fn(text, answer):  # the rollouts come first, in order; what comes later is guidance
            calls.append(text)
            group, inside = divmod(len(calls) - 1, cfg.group_size)
            return 1.0 if group >= 16 else float(inside % 2) if group >= share * 16 else 0.0

        def step():
            calls.clear()
            repo.train_step(model, tokenizer, optimizer, problems, replace(cfg, guidance="rephrase"), reward_fn)

        return step

    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    grpo, *guided = median_seconds(lambda: repo.train_step(model, tokenizer, optimizer, problems, cfg, coin),
                                   *map(step_with, shares), repeats=steps)
    print("RePO's step over a GRPO step in which every group has a signal, by the share of open gates")
    for share, seconds in zip(shares, guided):
        print(f"  {share:4.0%}   {seconds:.3f} s   {seconds / grpo:.2f}")


# ----------------------------------------------------------------------------------------------------- the command line


def integer(text: str) -> int:
    """A seed of the command line. Errors: ArgumentTypeError naming what was given."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer; seeds are 0, 1, 2, ...") from None


def parse_args(argv=None):
    """The flags. What is unknown or cannot work ends the program with what is possible."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["grpo", "repo"], choices=["repo", "grpo", "verbatim", "luffy", "sft"])
    parser.add_argument("--seeds", nargs="+", type=integer, help="seeds of training [0; with --compare 0 1 2 3 4]")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps [{STEPS}]")
    parser.add_argument("--world-seed", nargs="+", type=integer, default=[0], help="seed of the codebooks, or several [0]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda ... [CUDA where there is one]")
    parser.add_argument("--out", type=Path, help="folder for metrics.jsonl and summary.json")
    parser.add_argument("--compare", action="store_true", help="all five methods and RePO's ablations, in two tables (15 minutes)")
    parser.add_argument("--markdown", action="store_true", help="with --compare: print the README's results section")
    parser.add_argument("--bench", action="store_true", help="seconds of a step, beside TRL's where trl is installed")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; it must be at least 1")
    args.seeds = args.seeds or ([0, 1, 2, 3, 4] if args.compare else [0])
    return args


def main(argv=None) -> None:
    """Ctrl-C ends with the report of the runs that are finished."""
    args, started, results = parse_args(argv), time.perf_counter(), []
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(method, seed, world_seed, args.steps)
                for world_seed in args.world_seed for seed in args.seeds for method in args.methods]
        try:
            if args.bench:
                return bench(args.device, Path(folder))
            if args.compare:
                compare(args, Path(folder), results)
            else:
                run_jobs(jobs, Path(folder), args.device, results)
        except KeyboardInterrupt:
            print(f"\ninterrupted after {len(results)} finished runs")
    if results and not args.compare:
        report(results)
    if args.out:
        save(results, args.out)
    print(f"\n{time.perf_counter() - started:.0f} s on {args.device}, torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
