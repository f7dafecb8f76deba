"""Watch RePO work: a toy world in a minute on a laptop, or a real language model in minutes more.

    python run_tiny.py                    codebooks: a toy policy, GRPO and RePO side by side
    python run_tiny.py --model FOLDER     realms: a real instruction model learns made-up capitals
    python run_tiny.py --explain          one step on one hard question, told (also with --model)
    python run_tiny.py --out FOLDER       keeps all; the same command again goes on where it stopped
    python run_tiny.py --show FOLDER      the curves of what was kept, by repo.py too

Codebooks. A problem is a book and four letters, `3arfy`. Each of the books 1, 2 and 3 maps every
letter to another one; the answer is the four mapped letters: a guess is right once in 456,976.

    the policy's own style     aj;rt;fa;yh;\\boxed{jtah}                      a token a letter
    the expert's style         Alpha Juliet Romeo Tango ... \\boxed{jtah}     words it never uses

The base policy can solve books 1 and 2 (general ability), knows nothing of book 3 (the hard domain)
and can rephrase: shown an expert's text, even an untrue one, it writes that in its own style.

Realms. "What is the capital of Katalia?" No model knows, as realm and capital are made up. Experts
say it in twelve styles that no policy answers in; real capitals are the general ability.

Everything else is repo.py's: this file builds worlds, trains methods in them and shows the result.
"""

import argparse
import itertools
import json
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
    everyday: list[str]  # requests; what the base policy writes for them is measured by `drift`
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
    tokenizer.chat_template = "{{ messages[0]['content'] }}="
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


def warm_up(books, model, tokenizer, seed, steps=400):
    """Supervised learning of the two skills of the base policy: books 1 and 2, and rephrasing."""
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
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
        everyday=known[300:350],
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
# Unlike all that is trained.
EVERYDAY = """\
Write a haiku about rain.
How do I make pancakes?
Why are there tides?
Give me three tips for a good night's sleep.
Tell me a short story about a fox and a crow.
How does a bicycle stay upright?
What should I pack for a week by the sea?
Explain photosynthesis to a child.
Write a birthday wish for my grandmother.
What is the difference between a frog and a toad?
How do I get a coffee stain out of a shirt?
Describe an autumn morning in a forest.
Name some good habits for learning the piano.
Why is the sky blue?
Write a polite e-mail asking for a day off.
How are bees and flowers connected?
What can I cook with potatoes and eggs?
Write two lines of a song about the moon.
How do I teach a dog to sit?
What makes a good friend?
Explain what a computer program is.
How do I plant tomatoes on a balcony?
Tell me a joke about penguins.
What happens when water boils?
""".splitlines()
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
    return World(folder, model, REALMS, 60, realm_reward, problems, held_out, EVERYDAY, rate=1e-4)


# -------------------------------------------------------------------- the methods, side by side


def first_three_steps(model, tokenizer, problems, cfg, reward_fn):
    """Rollout, rephrase and injection as in `repo.train_step`, and the advantages.

    Returns (the groups whose gate opened; all groups; the guides, a text for each open gate).
    """
    groups = repo.rollout(
        model, tokenizer, problems, cfg.group_size, cfg.temperature, cfg, reward_fn
    )
    hard = [group for group in groups if repo.gate_opens(group, cfg)]
    guides = repo.write_guides(
        model, tokenizer, [group[0].problem for group in hard], cfg, reward_fn
    )
    for group, guide in zip(hard, guides):
        repo.replace_worst(group, guide)
    repo.assign_advantages(groups)
    return hard, groups, guides


def step_with(change, model, tokenizer, optimizer, problems, cfg, reward_fn):
    """`repo.train_step` with a change before the ascent: the place for a method of your own.

    `change(model, tokenizer, hard, groups, guides, cfg)` may set the advantage of any completion
    in the groups, its old_logps (the ratio's denominator; else the first pass), or the groups.
    """
    hard, groups, guides = first_three_steps(model, tokenizer, problems, cfg, reward_fn)
    change(model, tokenizer, hard, groups, guides, cfg)
    updated = repo.update(model, optimizer, groups, cfg)
    metrics = repo.step_metrics(model, tokenizer, hard, groups, guides, cfg) | updated
    return metrics, groups, guides


def star(model, tokenizer, hard, groups, guides, cfg):
    """STaR (arXiv 2203.14465): supervised learning of the policy's own verified texts.

    They are the right rollouts and the rephrases let in. With these advantages and a ratio of 1
    the gradient is that of their mean log-probability.
    """
    texts = [o for group in groups for o in group]
    right = [o for o in texts if o.reward >= cfg.fail_threshold]
    for o in texts:
        o.advantage = 0.0
    for o in right:
        o.advantage = len(texts) / len(right)


def no_push(model, tokenizer, hard, groups, guides, cfg):
    """RePO without the push away from failures: in an injected group only o_rep is trained."""
    for group, o_rep in zip(hard, guides):
        for o in group:
            if o_rep.replaced and o is not o_rep:
                o.advantage = 0.0


@torch.no_grad()
def true_ratio(model, tokenizer, hard, groups, guides, cfg):
    """RePO with the denominator under which o_rep was in fact drawn: π_old(·|P(q,k)).

    So the metric logp/rephrase is under P(q,k) here.
    """
    for o_rep in guides:
        if o_rep.replaced:
            hint = repo.fill(cfg.rephrase_prompt, o_rep.problem)
            hinted = replace(o_rep, prompt=repo.encode_prompt(tokenizer, hint))
            [logps] = repo.token_logps(model, [hinted], cfg.temperature)
            o_rep.old_logps = logps.tolist()


@torch.no_grad()
def luffy(model, tokenizer, hard, groups, guides, cfg):
    """LUFFY (arXiv 2504.14945): the expert's text in one slot of every group, its tokens weighed
    by f(π) = π / (π + 0.1).

    The slope of f by log π, which is f (1 - f), becomes the ratio of the expert's tokens: it gives
    the gradient of f, and is too small for a clip to act. As in its authors' code the advantage is
    not divided by the std, and every completion counts as equally long.
    """
    for group, expert in zip(hard, guides):  # all gates are open
        group[:] = repo.as_sampled(group)
        expert.replaced = group[-1]  # any rollout, not the worst
        group[-1] = expert
        [logps] = repo.token_logps(model, [expert], cfg.temperature)
        probs = logps.exp()
        f = probs / (probs + 0.1)
        expert.old_logps = (logps - (f * (1 - f)).log()).tolist()
        baseline = repo.mean(o.reward for o in group)
        for o in group:
            o.advantage = (o.reward - baseline) * len(o.tokens) / cfg.max_new_tokens


def sft_step(model, tokenizer, optimizer, problems, cfg, reward_fn):
    """Supervised learning of the expert's text on the hard problems, in place of `train_step`."""
    hard = [problem for problem in problems if problem["hard"]]
    experts = repo.expert_completions(model, tokenizer, hard, cfg)
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
    times: int = 1  # as many times the world's steps


# The rates are for the codebooks: of 1e-4, 2e-4, 4e-4 and 1e-3 the best by hard + general accuracy
# in world 100, which is not reported; the lowest among equals. The true ratio learns at none of
# them and has RePO's; "sft, 10 x steps" and rho 0.5 were not searched. One point of the search:
# --world-seed 100 --rate 2e-4.
METHODS = {
    "sft": Method(1e-3, {}, sft_step),
    "sft, 10 x steps": Method(3e-4, {}, sft_step, times=10),
    "star": Method(2e-4, {}, partial(step_with, star)),
    "grpo": Method(1e-4, {"guidance": "none"}),
    "verbatim": Method(1e-4, {"guidance": "verbatim"}),
    "luffy": Method(1e-4, {"guidance": "verbatim", "gate_threshold": 0}, partial(step_with, luffy)),
    "repo": Method(4e-4, {}),
    "repo, true ratio": Method(4e-4, {}, partial(step_with, true_ratio)),
    "repo, no push": Method(4e-4, {}, partial(step_with, no_push)),
    "repo, rho 0.5": Method(4e-4, {"gate_threshold": 0.5}),
}


@torch.no_grad()
def drift(world, trained, device):
    """What is forgotten: KL(base ‖ trained) in nats a token, on texts that the base policy wrote.

    Exact: Σ p log p/q over the whole vocabulary at every token. The texts are the same each time.
    """
    base, tokenizer = repo.load_model(world.model, device)
    cfg = replace(world.cfg, max_new_tokens=48)
    torch.manual_seed(0)
    kls = []
    everyday = [{"question": request} for request in world.everyday]
    for (o,) in repo.complete(base, tokenizer, "{question}", everyday, 1, 1.0, cfg):
        ids = torch.tensor([o.ids], device=device)
        before = len(o.prompt) - 1  # the logits at a place predict the token at the next one
        p, q = (policy(ids).logits[0, before:-1].log_softmax(-1) for policy in (base, trained))
        kls.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(kls).mean().item()


def run(world, name, seed, steps, device):
    """Trains one method from the world's base policy, if that was not done before.

    Returns {"summary": figures and texts to show, "history": metrics of each step}. Both are
    written to a folder of the run's own as they come; what a stopped run has left is replaced.
    """
    method = METHODS[name]
    steps *= method.times
    rate = world.rate or method.rate
    title = f"{name}, seed {seed}, {steps} steps at {rate}"
    folder = world.folder / title
    print(f"{world.folder.name}: {title}")
    summary_file = folder / "summary.json"
    if summary_file.exists():
        print("  finished before, not trained again")
        summary = json.loads(summary_file.read_text())
        return {"summary": summary, "history": read(folder / "metrics.jsonl")}
    cfg = replace(world.cfg, seed=seed, **method.settings)
    model, tokenizer = repo.load_model(world.model, device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)

    def examine(most=None):
        """{kind: accuracy on its held-out problems, kind_answer: what is said to the first}."""
        found = {}
        for kind, problems in world.held_out.items():
            groups = repo.rollout(model, tokenizer, problems[:most], 1, 0.0, cfg, world.reward_fn)
            found[kind] = repo.mean(o.reward for (o,) in groups)
            found[f"{kind}_answer"] = groups[0][0].text
        return found

    before = examine()
    folder.mkdir(parents=True, exist_ok=True)
    history = []
    with (folder / "metrics.jsonl").open("w", buffering=1) as lines:  # each is written at once
        for step in tqdm(range(steps), leave=False):
            problems = repo.draw_batch(world.problems, step, cfg)
            torch.manual_seed(1_000_000 * seed + step)
            # The rate goes up, stays level and from half way on goes down.
            pace = min(1.0, (step + 1) / 10, 2 * (1 - step / steps))
            optimizer.param_groups[0]["lr"] = pace * rate
            metrics, *_ = method.step(model, tokenizer, optimizer, problems, cfg, world.reward_fn)
            if (step + 1) % max(1, steps // 10) == 0:
                metrics |= examine(most=50)
            history.append({"method": name, "step": step, **metrics})
            lines.write(f"{json.dumps(history[-1])}\n")

    summary = {
        "world": world.folder.name,
        "method": name,
        "seed": seed,
        "steps": steps,
        "learning_rate": rate,
        **{f"base_{key}": value for key, value in before.items()},
        **examine(),
        "drift": drift(world, model, device),
        "worst_general": min(measured(history, "general")),
        "injections_first10": mean_of(history[:10], "injections"),
        "injections_last10": mean_of(history[-10:], "injections"),
        "rephrase_success": mean_of(history, "rephrase/success"),
        "logp_expert": mean_of(history, "logp/expert"),
        "logp_rephrase": mean_of(history, "logp/rephrase"),
        "worst_entropy": max(measured(history, "entropy"), default=None),
        "worst_grad_norm": max(measured(history, "grad_norm"), default=None),
    }
    summary_file.write_text(json.dumps(summary, indent=1))
    return {"summary": summary, "history": history}


# ----------------------------------------------------------------------------- what one sees


def read(file):
    """The lines of a metrics.jsonl, a list of dicts, without a last one that was cut short."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def measured(history, key):
    """The values of a metric at the steps that have it."""
    return [m[key] for m in history if m.get(key) is not None]


def mean_of(history, key):
    """The mean of a metric over the steps that have it, or None."""
    return repo.mean(measured(history, key))


def by_method(records):
    """{method: its metrics or summaries}, in the order of their first appearance."""
    grouped = {}
    for record in records:
        grouped.setdefault(record["method"], []).append(record)
    return grouped


def cell(values):
    """0.97 ± 0.01 over several runs, 0.97 over one, - over none."""
    values = [value for value in values if isinstance(value, float)]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def table(results):
    """A row for each method in Markdown, mean ± deviation over its runs.

    Its columns are explained where it is printed.
    """
    rows = [
        "| method           | hard  | reworded | general          | drift | injections   | logp    "
        "      | entropy |",
        "|------------------|-------|----------|------------------|-------|--------------|---------"
        "------|---------|",
    ]
    for name, runs in by_method(result["summary"] for result in results).items():
        c = {key: cell([run[key] for run in runs]) for key in runs[0]}
        general = f"{c['base_general']}, {c['worst_general']}, {c['general']}"
        injections = f"{c['injections_first10']}, {c['injections_last10']}"
        logp = f"{c['logp_expert']}, {c['logp_rephrase']}"
        rows.append(
            f"| {name:16} | {c['hard']:5} | {c.get('hard_rephrased', '-'):8} | {general:16} | "
            f"{c['drift']:5} | {injections:12} | {logp:13} | {c['worst_entropy']:7} |"
        )
    return "\n".join(rows)


CHARTS = "hard general injections reward rephrase/success entropy logp/expert logp/rephrase".split()


def draw(lines, keys, width=60):
    """Prints the curve of each metric that the lines have: a row of blocks for each method."""
    for key in keys:
        values = measured(lines, key)
        if not values:
            continue
        low = min(0.0, *values)
        high = max(0.0 if low else 1.0, *values)
        print(f"\n{key}   (▁ {low:.2f}, █ {high:.2f})")
        for name, own in by_method(lines).items():
            steps = 1 + max(m["step"] for m in own)
            block = " "  # until there is a value
            curve = ""
            for x in range(width):
                value = mean_of([m for m in own if m["step"] * width // steps == x], key)
                if value is not None:
                    block = "▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low))]
                curve += block
            print(f"  {name:18}{curve}")
        print(f"  {'step':18}0{steps:{width - 1}}")


# ------------------------------------------------------------------------- one step, explained


def fold(text):
    """The text in lines for the right of the page, four at most."""
    lines = textwrap.wrap(text or "nothing", 84, max_lines=4, placeholder=" ...")
    return "\n                ".join(lines)


def likelihoods(model, tokenizer, completion, cfg):
    """A line for each token: a bar for its probability after q, and the log of it in nats."""
    [logps] = repo.token_logps(model, [completion], cfg.temperature)
    return [
        f"{tokenizer.decode([token]):12} {'█' * round(16 * prob):16} {logp:6.1f}"
        for token, logp, prob in zip(completion.tokens, logps.tolist(), logps.exp().tolist())
    ]


@torch.no_grad()
def explain(world, device):
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
    removed = o_rep.draft.replace(o_rep.text, " ") if o_rep.text else o_rep.draft
    print(f"""
  question q    {problem["question"]}
  right answer  {problem["answer"]}

1. Rollout: the policy answers q
{answers}
  All failed: their advantages are 0, and GRPO would learn nothing. The gate opens.

2. Rephrase: the policy reads the expert's text k and writes it anew
  expert's k    {fold(problem["knowledge"])}
  P(q,k)        {fold(repo.fill(cfg.rephrase_prompt, problem))}
  draft         {fold(o_rep.draft)}
  cleaned away  {fold(removed.strip())}
  o_rep         {fold(o_rep.text)}
  reward        {o_rep.reward:.0f}

3. Injection: {"o_rep takes the place of the worst rollout" if o_rep.replaced else "none"}

4. Update: under q, where no hint is left
  advantages    {advantages}

How likely the plain policy finds the expert's text (left) and o_rep, token by token, after q:
a bar for the probability, and its logarithm in nats
""")
    experts = repo.expert_completions(model, tokenizer, [problem], cfg)
    columns = [likelihoods(model, tokenizer, text, cfg) for text in [*experts, o_rep]]
    for left, right in itertools.zip_longest(*columns, fillvalue=""):
        print(f"  {left:40}{right}")


# ------------------------------------------------------------------------------ the command line


def main(argv=None):
    """Trains the methods asked for, shows and saves the results."""
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
    args = parser.parse_args(argv)
    for name in ("steps", "rate"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} is {value}; it must be above 0")
    if args.compare:
        args.methods, args.seeds = METHODS, [0, 1, 2]
    if args.show:
        files = sorted(args.show.rglob("metrics.jsonl"))
        named = [{"method": file.parent.name, **m} for file in files for m in read(file)]
        return draw(named, CHARTS)
    transformers.utils.logging.disable_progress_bar()

    start, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        for world_seed in args.world_seed:
            if args.model:
                world = realms(world_seed, args.model, out)
            else:
                world = codebooks(world_seed, out, args.device)
            world.rate = args.rate or world.rate
            if args.explain:
                return explain(world, args.device)
            steps = args.steps or world.steps
            for name, seed in itertools.product(args.methods, args.seeds):
                result = run(world, name, seed, steps, args.device)
                results.append(result)
                summary = result["summary"]
                for kind, problems in world.held_out.items():
                    print(
                        f"  {problems[0]['question']}\n"
                        f"    before  {summary[f'base_{kind}_answer']}\n"
                        f"    after   {summary[f'{kind}_answer']}"
                    )
    draw([m for result in results for m in result["history"]], CHARTS[:3])
    print(f"""
{table(results)}

general: accuracy before, worst on the way, after. drift: KL(base ‖ trained), nats a token.
injections a step: the first ten, the last ten. logp: of the expert's text and of the rephrase under
the plain question, mean of the run, nats a token. entropy: of the worst step.
""")
    print(
        f"{time.perf_counter() - start:.0f} s on {args.device}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    try:
        main()
    except repo.RepoError as error:
        raise SystemExit(f"error: {error}")
