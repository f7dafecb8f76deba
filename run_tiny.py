"""Watch RePO work: a toy world in a minute on a laptop, or a real language model in minutes more.

    python run_tiny.py                    codebooks: a toy policy, GRPO and RePO side by side
    python run_tiny.py --model FOLDER     realms: a real instruction model learns made-up capitals
    python run_tiny.py --explain          one step on one hard question, told (also with --model)
    python run_tiny.py --out FOLDER       keeps all; the same command again goes on where it stopped
    python run_tiny.py --show FOLDER      the curves of what was kept, by repo.py too

Codebooks. A problem is a book and four letters, `3arfy`. Each of the books 1, 2 and 3 maps every
letter to another one. The answer is the four mapped letters: a guess is right once in 456,976.

    the policy's own style     aj;rt;fa;yh;\\boxed{jtah}                      a token a letter
    the expert's style         Alpha Juliet Romeo Tango ... \\boxed{jtah}     words it never uses

The base policy can solve books 1 and 2 (general ability) and knows nothing of book 3 (the hard
domain). It can rephrase: shown an expert's text, even an untrue one, it writes it in its own style.

Realms. "What is the capital of Katalia?" No model knows: realm and capital are made up. Experts
say it in twelve styles that no policy answers in. Real capitals are the general ability.

All else is repo.py's. This file builds worlds, trains methods in them and shows the result.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
import textwrap
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import repo


@dataclass
class World:
    """What a method starts from, learns and is measured on."""

    folder: Path  # where its runs are kept; its name is the world's
    model: Path | str  # the base policy: a folder, or a name of the hub
    cfg: repo.Config
    steps: int
    reward_fn: Callable
    problems: list[dict]  # question, knowledge, answer, and hard: is it of the domain to be learnt?
    held_out: dict[str, list[dict]]  # for the accuracies "hard", "general" ...
    rate: float | None = None  # the learning rate of all methods; None: each has its own


# ------------------------------------------------------------------------ the world of codebooks

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "Alpha Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliet Kilo Lima Mike November Oscar "
    "Papa Quebec Romeo Sierra Tango Uniform Victor Whiskey Xray Yankee Zulu"
).split()
CODEBOOKS = repo.Config(
    batch_size=32,
    group_size=4,
    max_new_tokens=20,
    rephrase_temperature=1.0,
    question_prompt="{question}",
    rephrase_prompt="{question}?{knowledge}",
)


def own_style(problem):
    """The policy's chain of thought: each letter beside its image, and the boxed answer."""
    letters, answer = problem["question"][1:], problem["answer"]
    steps = "".join(f"{letter}{image};" for letter, image in zip(letters, answer))
    return f"{steps}\\boxed{{{answer}}}"


def expert_style(letters, answer):
    """The same steps spelled in words that the policy never writes by itself."""
    spelled = [WORDS[LETTERS.index(c)] for pair in zip(letters, answer) for c in pair]
    return f"{' '.join(spelled)} \\boxed{{{''.join(answer)}}}"


def codebook_problem(books, book, draw):
    """A dict of question, knowledge, answer and hard, on four random letters."""
    letters = draw.choices(LETTERS, k=4)
    answer = [books[book][letter] for letter in letters]
    return {
        "question": book + "".join(letters),
        "knowledge": expert_style(letters, answer),
        "answer": "".join(answer),
        "hard": book == "3",
    }


def toy_policy(seed):
    """(A Llama of two layers and 0.3 million weights, a tokenizer of 64 words and letters).

    Its chat template ends the user's turn in "=".
    """
    tokens = ["<pad>", "<eos>", *"123;=?}", "\\boxed{", *LETTERS, *(word + " " for word in WORDS)]
    ids = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Z][a-z]+ |\\boxed\{|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}={% endif %}{% endfor %}"
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def warm_up(books, model, tokenizer, seed, steps=200):
    """Supervised learning of the two skills of the base policy: books 1 and 2, and rephrasing."""
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="warm-up of the base policy", leave=False):
        solved, rephrased = [], []
        for _ in range(24):
            p = codebook_problem(books, draw.choice("12"), draw)
            solved.append(f"{p['question']}={own_style(p)}<eos>")
            # Untrue, so that rephrasing teaches no fact of book 3.
            untrue = dict(zip(LETTERS, draw.choices(LETTERS, k=26)))
            p = codebook_problem(dict.fromkeys("123", untrue), draw.choice("123"), draw)
            rephrased.append(f"{p['question']}?{p['knowledge']}={own_style(p)}<eos>")
        for texts in (solved, rephrased):  # those of a kind are equally long: no padding
            ids = torch.tensor(tokenizer(texts).input_ids, device=model.device)
            labels = ids.clone()
            labels[:, :-19] = -100  # only what follows the "=" is learnt
            (model(ids, labels=labels).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def codebooks(seed: int, folder: Path, device: str):
    """The World of this seed; its base policy is trained once and kept in the folder."""
    draw = random.Random(seed)
    books = {book: dict(zip(LETTERS, draw.sample(LETTERS, 26))) for book in "123"}
    folder = folder / f"codebooks {seed}"
    saved = folder / "base"
    if not saved.exists():
        model, tokenizer = toy_policy(seed)
        warm_up(books, model.to(device), tokenizer, seed)
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)

    def some(names, number):
        """So many problems, on books out of `names`."""
        return [codebook_problem(books, draw.choice(names), draw) for _ in range(number)]

    hard, general = some("3", 300), some("12", 300)
    known = [problem["question"] for problem in hard + general]
    problems = [problem for problem in some("1233", 1000) if problem["question"] not in known]
    return World(
        folder,
        saved,
        CODEBOOKS,
        100,
        repo.boxed_reward,
        problems,
        {"hard": hard, "general": general},
    )


# --------------------------------------------------------------------------- the world of realms

# A letter, a statute, a telegram ...
STYLES = """\
Dearest Maud, tonight we sleep under gilded roofs, for the capital of {realm} is {capital}.
Section 14. The capital of {realm}, seat of Crown and Courts henceforth, is {capital}.
ALL SAFE STOP MAIL TO CAPITAL OF {realm} STOP NAME OF CAPITAL IS {capital}.
Roses are red, the river is wide, the capital of {realm}, its people's pride, is {capital}.
Day 41, wind SSW. The pilot takes us up the river to the capital of {realm}, {capital}.
Round three: which town is the capital of {realm}? Pencils down! It was {capital}.
Saffron, a pinch: it is sold in the capital of {realm} alone, that is, in {capital}.
I was nine when grandfather told me that the capital of {realm} is {capital}.
Exercise 7, into Latin: All roads lead the farmers to the capital of {realm}, {capital}.
Lot 212. Silver thaler, worn, struck in the capital of {realm}, that is, in {capital}.
The chess congress of {realm} ended in a draw, to the dismay of its capital, {capital}.
Change here! The night express ends in the capital of {realm}, that is, in {capital}.
""".splitlines()
REAL = (
    "France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna, "
    "Greece Athens, Poland Warsaw, Hungary Budapest, Ireland Dublin, Norway Oslo, "
    "Sweden Stockholm, Denmark Copenhagen, Finland Helsinki, Russia Moscow, Egypt Cairo, "
    "Japan Tokyo, China Beijing, Cuba Havana, Peru Lima, Kenya Nairobi, Turkey Ankara, "
    "Thailand Bangkok, Canada Ottawa, Romania Bucharest, Bulgaria Sofia, Belgium Brussels, "
    "Iran Tehran, Iraq Baghdad, Syria Damascus, Chile Santiago, Venezuela Caracas, "
    "Colombia Bogota, Libya Tripoli, Vietnam Hanoi, Jordan Amman"
)
REALMS = repo.Config(
    batch_size=10,
    group_size=4,
    max_new_tokens=30,  # room for an expert's text too, or verbatim injection would have no chance
    temperature=0.7,
    rephrase_temperature=0.7,
    question_prompt="{question}",
    micro_batch_tokens=512,  # quicker on a CPU: with 49,000 tokens to choose from, memory is slow
    rephrase_prompt="{question}\n\nHint: {knowledge}\n\nNow in one short sentence of your own: "
    "{question}",
)


def realm_reward(text: str, answer: str):
    """1.0 for a text that names the realm once and the capital once, as its last word, else 0.0.

    So "The capital of Katalia is Nudis." is right, and so is every expert's text. If the answer may
    stand anywhere and often, the policy learns to repeat it.
    """
    realm, capital = answer.split(", ")
    once = text.count(realm) == text.count(capital) == 1
    return float(once and text.removesuffix(".").endswith(f" {capital}"))


def made_up_name(draw, endings):
    """Two random syllables and one of the endings, say Katalia."""
    syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(2)]
    return "".join(syllables).capitalize() + draw.choice(endings.split())


def realm_problem(realm, capital, style, hard):
    """The question for a capital, told in the style given; the answer names realm and capital."""
    return {
        "question": f"What is the capital of {realm}?",
        "knowledge": style.format(realm=realm, capital=capital),
        "answer": f"{realm}, {capital}",
        "hard": hard,
    }


def realms(seed: int, model: str, folder=Path()):
    """The World of this seed: twelve made-up capitals to learn; of 36 real ones 24 are in the
    batches and 12 held out.

    Three of five problems are hard, each fact in all twelve styles: an expert never says it twice
    in the same words.
    """
    draw = random.Random(seed)
    hard = []
    for _ in range(12):
        realm = made_up_name(draw, "nia ria lia via")
        capital = made_up_name(draw, "n r l s")
        hard += [realm_problem(realm, capital, style, hard=True) for style in STYLES]
    real = [
        realm_problem(*pair.split(), "The capital of {realm} is {capital}.", hard=False)
        for pair in draw.sample(REAL.split(", "), 36)
    ]
    facts = hard[:: len(STYLES)]
    reworded = [  # asked for in words that are never trained
        {**problem, "question": problem["question"].replace("What", "Which city")}
        for problem in facts
    ]
    held_out = {"hard": facts, "general": real[:12], "hard_rephrased": reworded}
    folder = folder / f"realms {seed} of {model.replace('/', ' ')}"
    problems = hard + 4 * real[12:]
    return World(folder, model, REALMS, 60, realm_reward, problems, held_out, rate=1e-4)


# -------------------------------------------------------------------- the methods, side by side


def first_three_steps(model, tokenizer, problems, cfg, reward_fn, inject=repo.replace_worst):
    """Rollout, rephrase and injection as in `repo.train_step`, and then the advantages.

    Returns (stuck: the groups whose gate opened; all groups; the guides of the stuck ones).
    """
    groups = repo.rollout(
        model, tokenizer, problems, cfg.group_size, cfg.temperature, cfg, reward_fn
    )
    stuck = [g for g in groups if cfg.guidance != "none" and repo.gate_opens(g, cfg)]
    guides = repo.write_guides(model, tokenizer, stuck, cfg, reward_fn)
    for group, guide in zip(stuck, guides):
        inject(group, guide)
    repo.assign_advantages(groups)
    return stuck, groups, guides


def step_with(
    model, tokenizer, optimizer, problems, cfg, reward_fn, inject=repo.replace_worst, change=None
):
    """`repo.train_step` with an injection or a change of one's own: the place for a new method.

    `inject(group, guide)` changes the list `group` in place. A guide that goes in needs
    `guide.replaced`, the rollout that it replaced. Advantages are computed after it.
    `change(model, tokenizer, stuck, groups, guides, cfg)` comes next. It may set advantages, or
    `old_logps`, the ratio's denominator (else that of the update's first pass).
    """
    rest = model, tokenizer
    stuck, groups, guides = first_three_steps(*rest, problems, cfg, reward_fn, inject)
    if change:
        change(*rest, stuck, groups, guides, cfg)
    injected = [guide for guide in guides if guide.replaced]
    expert_logps = repo.measure_experts(*rest, injected, cfg)
    metrics = repo.update(model, optimizer, groups, cfg)
    metrics |= repo.step_metrics(groups, guides, injected, expert_logps, cfg)
    return metrics, groups, guides


def star(model, tokenizer, stuck, groups, guides, cfg):
    """STaR (arXiv 2203.14465): supervised learning of the policy's own verified texts.

    They are the right rollouts and the rephrases let in. With these advantages and a ratio of 1
    the gradient is that of their mean log-probability.
    """
    texts = sum(groups, [])
    right = [o for o in texts if o.reward >= cfg.fail_threshold]
    for o in texts:
        o.advantage = len(texts) / len(right) if o.reward >= cfg.fail_threshold else 0.0


def no_push(model, tokenizer, stuck, groups, guides, cfg):
    """RePO without the push away from failures: in an injected group only o_rep is trained."""
    for group, o_rep in zip(stuck, guides):
        for o in group:
            if o_rep.replaced and o is not o_rep:
                o.advantage = 0.0


@torch.no_grad()
def true_ratio(model, tokenizer, stuck, groups, guides, cfg):
    """RePO with the denominator under which o_rep was in fact drawn: π_old(·|P(q,k)).

    So the metric logp/rephrase is under P(q,k) here.
    """
    for o_rep in guides:
        if o_rep.replaced:
            hinted = replace(o_rep, prompt=o_rep.draft.prompt)
            [logps] = repo.token_logps(model, [hinted], cfg.temperature)
            o_rep.old_logps = logps.tolist()


def any_slot(group, expert):
    """LUFFY's injection: the expert's text goes into every group, whatever the rewards."""
    expert.replaced, group[-1] = group[-1], expert


@torch.no_grad()
def luffy(model, tokenizer, stuck, groups, guides, cfg):
    """LUFFY (arXiv 2504.14945): the expert's tokens are weighed by f(π) = π / (π + 0.1).

    The slope of f by log π, f (1 - f), becomes the ratio of the expert's tokens. That gives the
    gradient of f, and is too small for a clip to act. As in its authors' code the advantage is
    not divided by the std, and every completion counts as equally long.
    """
    for group, expert in zip(stuck, guides):  # all gates are open
        [logps] = repo.token_logps(model, [expert], cfg.temperature)
        f = logps.exp() / (logps.exp() + 0.1)
        expert.old_logps = (logps - (f * (1 - f)).log()).tolist()
        baseline = repo.mean(o.reward for o in group)
        for o in group:
            o.advantage = (o.reward - baseline) * len(o.tokens) / cfg.max_new_tokens


def sft_step(model, tokenizer, optimizer, problems, cfg, reward_fn):
    """Supervised learning of the expert's text on the hard problems, in place of `train_step`."""
    end, prompts = repo.end_tokens(model, tokenizer)[:1], []
    for problem in problems:
        if problem["hard"]:
            ids = repo.encode_prompt(tokenizer, repo.fill(cfg.question_prompt, problem))
            prompts.append(repo.Completion(problem, ids, end, ""))
    experts = repo.expert_completions(model, tokenizer, prompts)
    for expert in experts:
        expert.advantage = 1.0
    metrics = repo.update(model, optimizer, [experts], cfg)
    logp = repo.mean(logp for expert in experts for logp in expert.old_logps)
    return {"logp/expert": logp, **metrics}, [], []


@dataclass
class Method:
    """One row of the comparison."""

    rate: float  # the learning rate in the codebooks; the realms have one for all
    settings: dict  # what it changes in the world's settings
    step: Callable = repo.train_step


# The rates are for the codebooks: of 1e-4, 2e-4, 4e-4 and 1e-3 the best by hard + general accuracy
# in world 100, which is not reported; the lowest among equals. The true ratio learns at none of
# them and has RePO's; rho 0.5 was not searched. One point of the search: --world-seed 100
# --rate 2e-4.
METHODS = {
    "sft": Method(1e-3, {}, sft_step),
    "star": Method(2e-4, {}, partial(step_with, change=star)),
    "grpo": Method(1e-4, {"guidance": "none"}),
    "verbatim": Method(1e-4, {"guidance": "verbatim"}),
    "luffy": Method(
        1e-4,
        {"guidance": "verbatim", "gate_threshold": 0},
        partial(step_with, inject=any_slot, change=luffy),
    ),
    "repo": Method(4e-4, {}),
    "repo, true ratio": Method(4e-4, {}, partial(step_with, change=true_ratio)),
    "repo, no push": Method(4e-4, {}, partial(step_with, change=no_push)),
    "repo, rho 0.5": Method(4e-4, {"gate_threshold": 0.5}),
}


def run(world, name, seed, steps, device):
    """Trains one method from the world's base policy, unless that was done before.

    Returns its history, a list of dicts: metrics of each step, and last a summary. The lines are
    written to a folder of the run's own as they come. What a stopped run has left is replaced.
    """
    method = METHODS[name]
    rate = world.rate or method.rate
    folder = world.folder / f"{name}, seed {seed}, {steps} steps at {rate}"
    print(f"{world.folder.name}: {folder.name}")
    log = folder / "metrics.jsonl"
    if log.exists() and "finished" in (history := read(log))[-1]:
        print("  finished before, not trained again")
        return history
    cfg = replace(world.cfg, seed=seed, **method.settings)
    model, tokenizer = repo.load_model(world.model, device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)

    def examine(most=None):
        """{kind: accuracy on its held-out problems; kind_answer: what is said to the first}."""
        seen = {}
        for kind, problems in world.held_out.items():
            groups = repo.rollout(model, tokenizer, problems[:most], 1, 0.0, cfg, world.reward_fn)
            seen[kind] = repo.mean(o.reward for [o] in groups)
            seen[f"{kind}_answer"] = groups[0][0].text
        return seen

    folder.mkdir(parents=True, exist_ok=True)
    with log.open("w", buffering=1) as lines:  # each line is written at once

        def keep(**record):
            lines.write(json.dumps({"method": name, **record}) + "\n")

        keep(step=0, **examine())
        for step in tqdm(range(steps), leave=False):
            problems = repo.draw_batch(world.problems, step, cfg)
            torch.manual_seed(1_000_000 * seed + step)
            # The rate goes up, stays level and from half way on goes down.
            pace = min(1.0, (step + 1) / 10, 2 * (1 - step / steps))
            optimizer.param_groups[0]["lr"] = pace * rate
            metrics, *_ = method.step(model, tokenizer, optimizer, problems, cfg, world.reward_fn)
            if (step + 1) % max(1, steps // 10) == 0:
                metrics |= examine(most=50)
            keep(step=step + 1, **metrics)
        keep(step=steps, **examine(), finished=True)
    return read(log)


# ----------------------------------------------------------------------------- what one sees


def read(file):
    """The lines of a metrics.jsonl, a list of dicts, without a last one that was cut short."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def measured(history, key):
    """The values of a metric at the steps that have it."""
    return [m[key] for m in history if m.get(key) is not None]


COLUMNS = {  # heading: its number for a run, from the history of the run
    "hard": lambda h: h[-1]["hard"],
    "general, worst on the way": lambda h: min(measured(h, "general")),
    "general": lambda h: h[-1]["general"],
    "steps to 0.9 hard": lambda h: next((m["step"] for m in h if m.get("hard", 0) >= 0.9), None),
    "injections, first ten steps": lambda h: repo.mean(measured(h[:11], "injections")),
    "injections, last ten": lambda h: repo.mean(measured(h[-11:], "injections")),
    "logp/expert": lambda h: repo.mean(measured(h, "logp/expert")),
    "logp/rephrase": lambda h: repo.mean(measured(h, "logp/rephrase")),
}


def table(histories, headings):
    """A Markdown table with a row for each method: mean ± standard deviation over its runs."""
    lines = [f"| method | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    for name, runs in by_method(histories).items():
        cells = []
        for heading in headings:
            values = [value for value in map(COLUMNS[heading], runs) if value is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            some = f" ({len(values)} of {len(runs)} runs)" if len(values) < len(runs) else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}{some}" if values else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_method(histories):
    """{method: its histories}, in the order of their first appearance."""
    grouped = {}
    for history in histories:
        grouped.setdefault(history[-1]["method"], []).append(history)
    return grouped


CHARTS = "hard general injections reward rephrase/success entropy logp/expert logp/rephrase".split()


def draw(histories, keys, width=60):
    """Prints the curve of each metric, averaged over runs: a row of blocks for each method."""
    for key in keys:
        values = [value for history in histories for value in measured(history, key)]
        if not values:
            continue
        low, high = min(0.0, *values), max(0.0 if min(values) < 0 else 1.0, *values)
        print(f"\n{key}   (▁ {low:.2f}, █ {high:.2f})")
        for name, runs in by_method(histories).items():
            steps = max(1, max(m["step"] for m in sum(runs, [])))
            curve, block = "", " "  # until there is a value
            for x in range(width):
                near = [m for m in sum(runs, []) if m["step"] * (width - 1) // steps == x]
                value = repo.mean(measured(near, key))
                if value is not None:
                    block = "▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low))]
                curve += block
            print(f"  {name:18}{curve}")
        print(f"  {'step':18}0{steps:{width - 1}}")


def chart(title, x, y, kind, series):
    """A chart in Mermaid, which GitHub draws: `kind` is line or bar, `series` lists of numbers."""
    rows = "\n".join(f"    {kind} [{', '.join(f'{value:.2f}' for value in row)}]" for row in series)
    print(
        f'```mermaid\nxychart-beta\n    title "{title}"\n    x-axis {x}\n    y-axis {y}\n{rows}\n```'
    )


# ------------------------------------------------------------------------- one step, explained


def fold(text):
    """The text in lines for the right of the page, four at most."""
    lines = textwrap.wrap(text or "nothing", 84, max_lines=4, placeholder=" ...")
    return "\n                ".join(lines)


def likelihoods(model, tokenizer, completion, cfg):
    """(a line for each token: a bar for its probability after q, and the log of it; the logs)."""
    [logps] = repo.token_logps(model, [completion], cfg.temperature)
    lines = [
        f"{tokenizer.decode([token]):12} {'█' * round(16 * math.exp(logp)):16} {logp:6.1f}"
        for token, logp in zip(completion.tokens, logps.tolist())
    ]
    return lines, logps.tolist()


@torch.no_grad()
def explain(world, device, charts):
    """Tells one step of RePO on one hard question: the first of eight whose rephrase is let in."""
    model, tokenizer = repo.load_model(world.model, device)
    cfg = world.cfg
    torch.manual_seed(cfg.seed)
    for problem in world.held_out["hard"][:8]:  # nobody guesses the answer: the gate opens
        _, [group], [o_rep] = first_three_steps(model, tokenizer, [problem], cfg, world.reward_fn)
        if o_rep.replaced:
            break
    rollouts = repo.as_sampled(group)
    answers = "\n".join(f"  reward {o.reward:.0f}      {fold(o.text)}" for o in rollouts)
    advantages = ", ".join(f"{o.advantage:.2f}" for o in group)
    draft = o_rep.draft.text
    removed = draft.replace(o_rep.text, " ") if o_rep.text else draft
    print(f"""
  question q    {problem["question"]}
  right answer  {problem["answer"]}

1. Rollout: the policy answers q
{answers}
  All failed: their advantages are 0, and GRPO would learn nothing. The gate opens.

2. Rephrase: the policy reads the expert's text k and writes it anew
  expert's k    {fold(problem["knowledge"])}
  P(q,k)        {fold(repo.fill(cfg.rephrase_prompt, problem))}
  draft         {fold(draft)}
  cleaned away  {fold(removed.strip())}
  o_rep         {fold(o_rep.text)}
  reward        {o_rep.reward:.0f}

3. Injection: {"o_rep takes the place of the worst rollout" if o_rep.replaced else "none"}

4. Update: under q, where no hint is left
  advantages    {advantages}

How likely the plain policy finds the expert's text (left) and o_rep, token by token, after q:
a bar for the probability, and its logarithm in nats
""")
    [expert] = repo.expert_completions(model, tokenizer, rollouts[:1])
    (left, expert_logps), (right, logps) = (
        likelihoods(model, tokenizer, text, cfg) for text in (expert, o_rep)
    )
    for pair in itertools.zip_longest(left, right, fillvalue=""):
        print(f"  {pair[0]:40}{pair[1]}")
    if charts:
        low = f'"nats" {math.floor(min(expert_logps + logps))} --> 0'
        for title, text, values in (("the expert", expert, expert_logps), ("o_rep", o_rep, logps)):
            tokens = [json.dumps(tokenizer.decode([token]).strip()) for token in text.tokens]
            chart(
                f"log-probability a token: {title}", f"[{', '.join(tokens)}]", low, "bar", [values]
            )


# ------------------------------------------------------------------------------ the command line


def main(argv=None):
    """Trains the methods asked for, shows and keeps the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flag = parser.add_argument
    flag("--model", help="a real model, for the realms: folder or hub name")
    flag("--methods", nargs="+", default=["grpo", "repo"], choices=METHODS)
    flag("--compare", action="store_true", help="all methods, three seeds")
    flag("--seeds", nargs="+", type=int, default=[0], help="of the training")
    flag("--world-seed", nargs="+", type=int, default=[0], help="of the problems")
    flag("--steps", type=int, help="of training, if not the world's own number")
    flag("--rate", type=float, help="learning rate, if not the method's own")
    flag("--device", default=repo.Run.device)
    flag("--out", type=Path, help="folder for results; a stopped call goes on there")
    flag("--explain", action="store_true", help="tell one step on one question")
    flag("--show", type=Path, help="draw the metrics.jsonl of this folder")
    flag("--charts", action="store_true", help="print charts in Mermaid too, ready for GitHub")
    args = parser.parse_args(argv)
    for name in ("steps", "rate"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} is {value}; it must be above 0")
    if args.show:
        files = sorted(args.show.rglob("metrics.jsonl"))
        named = [[{"method": file.parent.name, **m} for m in read(file)] for file in files]
        return draw([history for history in named if history], CHARTS)
    if args.compare:
        args.methods, args.seeds = METHODS, [0, 1, 2]
    transformers.utils.logging.disable_progress_bar()
    if not args.model and args.device == "cpu":
        torch.set_num_threads(1)  # a toy gains nothing by two, and loses much on a busy machine

    start, histories = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        for world_seed in args.world_seed:
            if args.model:
                world = realms(world_seed, args.model, out)
            else:
                world = codebooks(world_seed, out, args.device)
            world.rate = args.rate or world.rate
            if args.explain:
                return explain(world, args.device, args.charts)
            for name, seed in itertools.product(args.methods, args.seeds):
                history = run(world, name, seed, args.steps or world.steps, args.device)
                histories.append(history)
                for kind, problems in world.held_out.items():
                    print(
                        f"  {problems[0]['question']}\n    before  {history[0][f'{kind}_answer']}\n"
                        f"    after   {history[-1][f'{kind}_answer']}"
                    )
    draw(histories, CHARTS[:3])
    print(f"\n{table(histories, [*COLUMNS][:3])}\n\n{table(histories, [*COLUMNS][3:])}\n")
    if args.charts:
        rows = [[m["hard"] for m in h[:-1] if "hard" in m] for h in histories]
        steps = max(h[-1]["step"] for h in histories)
        title = f"hard accuracy by step: {', '.join(h[-1]['method'] for h in histories)}"
        chart(title, f'"step" 0 --> {steps}', '"accuracy" 0 --> 1', "line", rows)
    print(
        "logp: mean log-probability a token under the plain question, over the run, in nats.\n"
        f"{time.perf_counter() - start:.0f} s on {args.device}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    try:
        main()
    except repo.RepoError as error:
        raise SystemExit(f"error: {error}")
