"""Watch RePO work: a toy world in two minutes, or a real language model in minutes more.

    python run_tiny.py                    codebooks: a toy policy, GRPO and RePO side by side
    python run_tiny.py --model FOLDER     realms: a real instruction model learns made-up capitals
    python run_tiny.py --explain          one step on one hard question, told (also with --model)
    python run_tiny.py --out FOLDER       keeps all; the same command again goes on where it stopped
    python run_tiny.py --show FOLDER      the curves of what was kept, by repo.py too

Codebooks. A problem is a book and four letters, `3arfy`. Each of the books 1, 2 and 3 maps every
letter to another one, and the answer is the four images. A guess is right once in 456,976.
    the policy's own style     aj;rt;fa;yh;\\boxed{jtah}                      a token a letter
    the expert's style         Alpha Juliet Romeo Tango ... \\boxed{jtah}     words it never uses
The base policy solves books 1 and 2 (general ability) and knows nothing of book 3 (hard domain).
It can rephrase: shown an expert's text, even an untrue one, it writes it in its own style.

Realms. "What is the capital of Katalia?" No model knows: realm and capital are made up. Experts
say it in twelve styles that no policy answers in. Real capitals are the general ability.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import textwrap
import time
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

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
    reward_fn: object  # (text, answer) -> number
    problems: list[dict]  # question, knowledge, answer, and hard: is it of the domain to be learnt?
    held_out: dict[str, list[dict]]  # for the accuracies "hard", "general" ...
    rate: float | None = None  # the learning rate of all methods; None: each has its own


# ------------------------------------------------------------------------ the world of codebooks

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = """Alpha Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliet Kilo Lima Mike November
Oscar Papa Quebec Romeo Sierra Tango Uniform Victor Whiskey Xray Yankee Zulu""".split()
SPELL = dict(zip(LETTERS, NAMES))
TEMPLATE = "{% for m in messages %}{{ m.content + {'user': '='}.get(m.role, '<eos>') }}{% endfor %}"
CODEBOOKS = dict(batch_size=16, group_size=4, max_new_tokens=20)
CODEBOOKS |= dict(question_prompt="{question}", rephrase_prompt="{question}?{knowledge}")


def codebook_problem(books, book, draw):
    """Four random letters for a book; the expert spells each letter and its image."""
    letters = "".join(draw.choices(LETTERS, k=4))
    answer = "".join(books[book][letter] for letter in letters)
    spelled = " ".join(SPELL[c] for pair in zip(letters, answer) for c in pair)
    knowledge = f"{spelled} \\boxed{{{answer}}}"
    return dict(question=book + letters, knowledge=knowledge, answer=answer, hard=book == "3")


def own_style(question, answer):
    """The policy's chain of thought: each letter beside its image, and the boxed answer."""
    return "".join(map("{}{};".format, question[1:], answer)) + f"\\boxed{{{answer}}}"


def base_policy(books, seed, device, steps=250):
    """A Llama of 0.3 million weights that solves books 1 and 2 and rephrases, and its tokenizer."""
    tokens = ["<pad>", "<eos>", *"123;=?}", "\\boxed{", *LETTERS, *(name + " " for name in NAMES)]
    ids = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Z][a-z]+ |\\boxed\{|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(vocab_size=len(tokens), tie_word_embeddings=True, eos_token_id=ids["<eos>"])
    shape |= dict(initializer_range=0.05)  # with the default of 0.02 it learns more slowly
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(device)
    draw, weights = random.Random(seed), list(model.parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="warm-up of the base policy", leave=False):
        solved, rephrased = [], []
        for _ in range(16):
            p = codebook_problem(books, draw.choice("12"), draw)
            solved.append(f"{p['question']}={own_style(p['question'], p['answer'])}<eos>")
            # Untrue, so that rephrasing teaches no fact of book 3.
            untrue = dict(zip(LETTERS, draw.choices(LETTERS, k=26)))
            p = codebook_problem(dict.fromkeys("123", untrue), draw.choice("123"), draw)
            own = own_style(p["question"], p["answer"])
            rephrased.append(f"{p['question']}?{p['knowledge']}={own}<eos>")
        for texts in (solved, rephrased):  # those of a kind are equally long: no padding
            batch = torch.tensor(tokenizer(texts).input_ids, device=device)
            labels = batch.clone()
            labels[:, :-19] = -100  # only what follows the "=" is learnt
            (model(batch, labels=labels).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, tokenizer


def codebooks(seed: int, folder: Path, device: str):
    """The World of this seed; its base policy is trained once and kept in the folder."""
    draw = random.Random(seed)
    books = {book: dict(zip(LETTERS, draw.sample(LETTERS, 26))) for book in "123"}
    saved = folder / f"codebooks {seed}" / "base"
    if not saved.exists():
        for part in base_policy(books, seed, device):
            part.save_pretrained(saved)
    hard, general, problems = (
        [codebook_problem(books, draw.choice(names), draw) for _ in range(number)]
        for names, number in (("3", 300), ("12", 300), ("1233", 1000))
    )
    problems = [problem for problem in problems if problem not in hard + general]
    cfg, held_out = repo.Config(**CODEBOOKS), {"hard": hard, "general": general}
    return World(saved.parent, saved, cfg, 100, repo.boxed_reward, problems, held_out)


# --------------------------------------------------------------------------- the world of realms

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
REAL = """France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna,
Greece Athens, Poland Warsaw, Hungary Budapest, Ireland Dublin, Norway Oslo, Sweden Stockholm,
Denmark Copenhagen, Finland Helsinki, Russia Moscow, Egypt Cairo, Japan Tokyo, China Beijing,
Cuba Havana, Peru Lima, Kenya Nairobi, Turkey Ankara, Thailand Bangkok, Canada Ottawa,
Romania Bucharest, Bulgaria Sofia, Belgium Brussels, Iran Tehran, Iraq Baghdad, Syria Damascus,
Chile Santiago, Venezuela Caracas, Colombia Bogota, Libya Tripoli, Vietnam Hanoi, Jordan Amman"""
REALMS = dict(batch_size=10, group_size=4, temperature=0.7, rephrase_temperature=0.7)
# 30 tokens have room for an expert's text. Micro-batches of 512 tokens are quicker on a CPU.
REALMS |= dict(max_new_tokens=30, micro_batch_tokens=512, question_prompt="{question}")
REALMS["rephrase_prompt"] = (
    "{question}\n\nHint: {knowledge}\n\nNow in one short sentence of your own: {question}"
)


def realm_reward(text: str, answer: str):
    """1.0 if realm and capital are named once, or repetition would pay, and the capital last."""
    realm, capital = answer.split(", ")
    once = text.count(realm) == text.count(capital) == 1
    return float(once and text.removesuffix(".").endswith(f" {capital}"))


def realm_problem(realm, capital, style="The capital of {realm} is {capital}.", hard=False):
    """The question for a capital, told in the style given."""
    question, answer = f"What is the capital of {realm}?", f"{realm}, {capital}"
    knowledge = style.format(realm=realm, capital=capital)
    return dict(question=question, knowledge=knowledge, answer=answer, hard=hard)


def realms(seed: int, model: str, folder=Path()):
    """The World of this seed: twelve made-up capitals, each in all styles, and 36 real ones."""
    draw, hard = random.Random(seed), []
    for _ in range(12):
        names = []  # Katalia and Nudis, say
        for endings in ("nia ria lia via", "n r l s"):
            syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(2)]
            names.append("".join(syllables).capitalize() + draw.choice(endings.split()))
        hard += [realm_problem(*names, style, hard=True) for style in STYLES]
    real = [realm_problem(*pair.split()) for pair in draw.sample(REAL.split(","), 36)]
    facts = hard[:: len(STYLES)]
    reworded = [p | dict(question=p["question"].replace("What", "Which city")) for p in facts]
    held_out = {"hard": facts, "general": real[:12], "hard_rephrased": reworded}
    folder = folder / f"realms {seed} of {model.replace('/', ' ')}"
    cfg, problems = repo.Config(**REALMS), hard + 4 * real[12:]
    return World(folder, model, cfg, 60, realm_reward, problems, held_out, rate=1e-4)


# -------------------------------------------------------------------- the methods, side by side


def first_three_steps(model, tokenizer, problems, cfg, reward_fn, inject=None):
    """Rollout, rephrase and injection as in `repo.train_step`, and then the advantages.

    Returns (rollouts; stuck, the groups whose gate opened; all groups; guides of the stuck ones).
    """
    group_size, temperature = cfg.group_size, cfg.temperature
    groups = repo.rollout(model, tokenizer, problems, group_size, temperature, cfg, reward_fn)
    rollouts = sum(groups, [])
    stuck = [g for g in groups if cfg.guidance != "none" and repo.gate_opens(g, cfg)]
    guides = repo.write_guides(model, tokenizer, stuck, cfg, reward_fn)
    for group, guide in zip(stuck, guides):
        (inject or repo.replace_worst)(group, guide)
    repo.assign_advantages(groups)
    return rollouts, stuck, groups, guides


def step_with(model, tokenizer, optimizer, problems, cfg, reward_fn, inject=None, change=None):
    """`repo.train_step` with an injection or a change of one's own: the place for a new method.

    `inject(group, guide)` may put the guide into the list `group`. It checks the guide: a failed
    one has a low reward, a refused one no text. Advantages are computed after it.
    `change(model, tokenizer, stuck, groups, guides, cfg)` comes next. It may set `o.advantage`, or
    `o.old_logps`, the ratio's denominator (else that of the update's first pass).
    """
    made = first_three_steps(model, tokenizer, problems, cfg, reward_fn, inject)
    rollouts, stuck, groups, guides = made
    repo.require(all(o.tokens for o in sum(groups, [])), "a text without tokens was injected")
    if change:
        change(model, tokenizer, stuck, groups, guides, cfg)
    expert_logps = repo.measure_experts(model, tokenizer, guides, cfg)
    metrics = repo.update(model, optimizer, groups, cfg)
    metrics |= repo.step_metrics(rollouts, guides, expert_logps, cfg)
    return metrics, groups, guides


def star(model, tokenizer, stuck, groups, guides, cfg):
    """STaR (arXiv 2203.14465): supervised learning of the policy's own verified texts.

    With these advantages and a ratio of 1 the gradient is that of their mean log-probability.
    """
    texts = sum(groups, [])
    right = [o.reward >= cfg.fail_threshold for o in texts]
    for o, verified in zip(texts, right):
        o.advantage = len(texts) / sum(right) if verified else 0.0


def no_push(model, tokenizer, stuck, groups, guides, cfg):
    """RePO without the push away from failures: in an injected group only o_rep is trained."""
    for group, o_rep in zip(stuck, guides):
        for o in group:
            if o_rep.advantage and o is not o_rep:
                o.advantage = 0.0


@torch.no_grad()
def true_ratio(model, tokenizer, stuck, groups, guides, cfg):
    """RePO with the denominator under which o_rep was in fact drawn: π_old(·|P(q,k))."""
    for o_rep in guides:
        if o_rep.advantage:
            hinted = replace(o_rep, prompt=o_rep.draft.prompt)
            [logps] = repo.token_logps(model, [hinted], cfg.temperature)
            o_rep.old_logps = logps.tolist()  # so the metric logp/rephrase is under P(q,k) here


def any_slot(group, expert):
    """LUFFY's injection: the expert's text goes into every group, whatever the rewards."""
    expert.replaced, group[-1] = group[-1], expert


@torch.no_grad()
def luffy(model, tokenizer, stuck, groups, guides, cfg):
    """LUFFY (arXiv 2504.14945): the expert's tokens are weighed by f(π) = π / (π + 0.1).

    The ratio of these tokens becomes f (1 - f), the slope of f by log π. That gives the gradient of
    f, and the clip does not act. As in its authors' code the advantage is not divided by the std,
    and all texts count as equally long.
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
    end = repo.end_tokens(model, tokenizer)[:1]
    hard = [problem for problem in problems if problem["hard"]]
    prompts = [repo.encode_prompt(tokenizer, repo.fill(cfg.question_prompt, p)) for p in hard]
    places = [repo.Completion(p, prompt, end, "") for p, prompt in zip(hard, prompts)]
    experts = repo.expert_completions(model, tokenizer, places)
    for expert in experts:
        expert.advantage = 1.0
    metrics = repo.update(model, optimizer, [experts], cfg)
    metrics["logp/expert"] = repo.mean(logp for expert in experts for logp in expert.old_logps)
    return metrics, [], []


# A method: its rate in the codebooks (the README says how it was found), what it changes in the
# world's settings, and its step.
Method = namedtuple("Method", "rate settings step", defaults=[repo.train_step])
EVERY_GROUP = {"guidance": "verbatim", "gate_threshold": 0}
METHODS = {
    "sft": Method(1e-4, {}, sft_step),
    "star": Method(4e-4, {}, partial(step_with, change=star)),
    "grpo": Method(1e-4, {"guidance": "none"}),
    "verbatim": Method(1e-4, {"guidance": "verbatim"}),
    "luffy": Method(1e-4, EVERY_GROUP, partial(step_with, inject=any_slot, change=luffy)),
    "repo": Method(4e-4, {}),
    "repo, true ratio": Method(1e-4, {}, partial(step_with, change=true_ratio)),
    "repo, no push": Method(4e-4, {}, partial(step_with, change=no_push)),
}


def run(world, name, seed, steps, device):
    """Trains one method from the world's base policy, unless that was done before.

    Returns its history, a list of dicts: metrics of each step, and last a summary. It is kept in a
    folder of the run's own as it comes. What a stopped run has left is replaced.
    """
    method = METHODS[name]
    rate = world.rate or method.rate
    log = world.folder / f"{name}, seed {seed}, {steps} steps at {rate}" / "metrics.jsonl"
    print(f"{world.folder.name}: {log.parent.name}")
    if log.exists() and any("finished" in record for record in read(log)):
        print("  finished before, not trained again")
        return read(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    cfg = replace(world.cfg, seed=seed, **method.settings)
    model, tokenizer = repo.load_model(world.model, device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)

    def examine(most=None):
        """{kind: accuracy on its held-out problems; kind_answer: what is said to the first}."""
        seen, parts = {}, {kind: part[:most] for kind, part in world.held_out.items()}
        said = repo.rollout(model, tokenizer, sum(parts.values(), []), 1, 0.0, cfg, world.reward_fn)
        for kind, part in parts.items():
            own, said = said[: len(part)], said[len(part) :]
            seen |= {kind: repo.mean(o.reward for [o] in own), f"{kind}_answer": own[0][0].text}
        return seen

    log.write_text("")
    repo.append(log, dict(method=name, step=0, **examine(most=50)))
    for step in tqdm(range(steps), leave=False):
        problems = repo.draw_batch(world.problems, step, cfg)
        torch.manual_seed(1_000_000 * seed + step)
        # The rate goes up in ten steps, stays level, and in the last third goes down.
        pace = min(1.0, (step + 1) / 10, 3 * (1 - step / steps))
        optimizer.param_groups[0]["lr"] = pace * rate
        metrics, *_ = method.step(model, tokenizer, optimizer, problems, cfg, world.reward_fn)
        if (step + 1) % max(1, steps // 10) == 0:
            metrics |= examine(most=50)
        repo.append(log, dict(method=name, step=step + 1, **metrics))
    repo.append(log, dict(method=name, step=steps, **examine(), finished=True))
    return read(log)


# ----------------------------------------------------------------------------- what one sees


def read(file):
    """The lines of a metrics.jsonl, a list of dicts, without a last one that was cut short."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def measured(records, key):
    """The values of a metric at the steps that have it."""
    return [m[key] for m in records if m.get(key) is not None]


COLUMNS = {  # heading: its number for a run, from the history of the run
    "hard": lambda h: h[-1]["hard"],
    "general, worst on the way": lambda h: min(measured(h[1:], "general")),
    "general, after": lambda h: h[-1]["general"],
    "steps to 0.9 hard": lambda h: next((m["step"] for m in h if m.get("hard", 0) >= 0.9), None),
    "injections, first ten steps": lambda h: repo.mean(measured(h[:11], "injections")),
    "injections, last ten": lambda h: repo.mean(measured(h[-11:], "injections")),
    "logp/expert": lambda h: repo.mean(measured(h, "logp/expert")),
    "logp/rephrase": lambda h: repo.mean(measured(h, "logp/rephrase")),
}
CURVES = "hard general injections reward rephrase/success entropy logp/expert logp/rephrase".split()


def table(histories, headings):
    """A Markdown table with a row for each method: mean ± standard deviation over its runs."""
    lines = [f"| method | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    for name in dict.fromkeys(history[-1]["method"] for history in histories):
        runs, cells = [h for h in histories if h[-1]["method"] == name], []
        for heading in headings:
            values = [value for value in map(COLUMNS[heading], runs) if value is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            some = f" ({len(values)} of {len(runs)} runs)" if len(values) < len(runs) else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}{some}" if values else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(records, keys, width=60):
    """Prints the curve of each metric, averaged over runs: a row of blocks for each method."""
    steps = max([1, *measured(records, "step")])
    for key in [key for key in keys if measured(records, key)]:
        values = measured(records, key)
        low, high = min(0.0, *values), max(0.0 if min(values) < 0 else 1.0, *values)
        print(f"\n{key}   from step 0 to {steps}, ▁ is {low:.2f} and █ {high:.2f}")
        for name in dict.fromkeys(m["method"] for m in records):
            own, curve, level = [m for m in records if m["method"] == name], "", 0
            for x in range(width):
                near = measured([m for m in own if m["step"] * (width - 1) // steps == x], key)
                if near:
                    level = 1 + round(7 * (repo.mean(near) - low) / (high - low))
                curve += " ▁▂▃▄▅▆▇█"[level]
            print(f"  {name:18}{curve}")


def chart(title, x, y, kind, series):
    """A chart in Mermaid, which GitHub draws: `kind` is line or bar, `series` lists of numbers."""
    print('```mermaid\n%%{init:{"themeVariables":{"xyChart":{"plotColorPalette":"gray,red"}}}}%%')
    print(f'xychart-beta\n    title "{title}"\n    x-axis {x}\n    y-axis {y}')
    for values in series:
        print(f"    {kind} [{', '.join(f'{value:.2f}' for value in values)}]")
    print("```")


@torch.no_grad()
def explain(world, device, charts):
    """Tells one step of RePO on one hard question: the first of eight whose rephrase is let in."""
    model, tokenizer = repo.load_model(world.model, device)
    cfg, short = world.cfg, partial(textwrap.shorten, width=300)
    torch.manual_seed(cfg.seed)
    for problem in world.held_out["hard"][:8]:  # nobody guesses the answer: the gate opens
        made = first_three_steps(model, tokenizer, [problem], cfg, world.reward_fn)
        rollouts, _, [group], [o_rep] = made
        if o_rep.advantage:
            break
    answers = "\n".join(f"  reward {o.reward:.0f}      {short(o.text)}" for o in rollouts)
    print(f"""
  question q    {problem["question"]}    (right: {problem["answer"]})

1. Rollout: the policy answers q
{answers}
  All failed: their advantages are 0, and GRPO would learn nothing. The gate opens.

2. Rephrase: the policy reads the expert's text k and writes it anew
  expert's k    {problem["knowledge"]}
  P(q,k)        {short(repo.fill(cfg.rephrase_prompt, problem))}
  draft         {short(o_rep.draft.text)}
  o_rep         {short(o_rep.text) or "refused"}    (the draft, cleaned; reward {o_rep.reward:.0f})

3. Injection: {"o_rep takes the place of the worst rollout" if o_rep.advantage else "none"}
4. Update: under q, with the advantages {", ".join(f"{o.advantage:.2f}" for o in group)}""")
    texts = [o for o in [*repo.expert_completions(model, tokenizer, group[:1]), o_rep] if o.tokens]
    logps = [values.tolist() for values in repo.token_logps(model, texts, cfg.temperature)]
    for title, text, values in zip(("the expert's text", "o_rep"), texts, logps):
        tokens = [tokenizer.decode([token]).strip() for token in text.tokens]
        print(f"\nAfter q, how likely is {title}?\n  token        probability      -log, in nats")
        for token, value in zip(tokens, values):
            print(f"  {token:12} {'█' * round(16 * math.exp(value)):16} {-value:6.1f}")
        print(f"  {sum(value < math.log(0.01) for value in values)} of {len(values)} are below 1 %")
        if charts:
            names = json.dumps([f"{i}:{token}" for i, token in enumerate(tokens, 1)])
            height = f'"-log probability, nats" 0 --> {math.ceil(-min(sum(logps, [])))}'
            chart(f"how unlikely: {title}", names, height, "bar", [[-value for value in values]])


def main(argv=None):
    """Trains the methods asked for in each world, and shows what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flag = parser.add_argument
    flag("--model", help="a real model, for the realms: folder or hub name")
    flag("--methods", nargs="+", default=["grpo", "repo"], choices=METHODS)
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
    model, device, histories, start = args.model, args.device, [], time.perf_counter()
    if not all(value is None or value > 0 for value in (args.steps, args.rate)):
        parser.error("--steps and --rate must be above 0")
    if args.show:
        files = sorted(args.show.rglob("metrics.jsonl"))
        records = [{"method": file.parent.name, **m} for file in files for m in read(file)]
        return draw(records, CURVES)
    transformers.utils.logging.disable_progress_bar()
    if not model and device == "cpu":
        torch.set_num_threads(1)  # a toy gains nothing by two, and loses much on a busy machine
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        for number in args.world_seed:
            world = realms(number, model, out) if model else codebooks(number, out, device)
            world.rate = args.rate or world.rate
            if args.explain:
                return explain(world, device, args.charts)
            for name, seed in [(name, seed) for name in args.methods for seed in args.seeds]:
                histories.append(run(world, name, seed, args.steps or world.steps, device))
                for kind, [first, *_] in world.held_out.items():
                    before, after = (histories[-1][i][f"{kind}_answer"] for i in (0, -1))
                    print(f"  {first['question']} ({kind})\n   before {before}\n   after  {after}")
    draw(sum(histories, []), CURVES[:3])
    print(f"\n{table(histories, [*COLUMNS][:3])}\n\n{table(histories, [*COLUMNS][3:])}\n")
    if args.charts:
        names, last = ", ".join(h[-1]["method"] for h in histories), histories[0][-1]["step"]
        rows = [measured(history[:-1], "hard") for history in histories]
        chart(f"hard by step: {names}", f"step 0 --> {last}", "accuracy 0 --> 1", "line", rows)
    print("logp: mean log-probability a token after the plain question, over the run, in nats")
    print(f"{time.perf_counter() - start:.0f} s on {device}, torch {torch.__version__}")


if __name__ == "__main__":
    try:
        main()
    except repo.RepoError as error:
        raise SystemExit(f"error: {error}")
