"""Watch RePO work: a toy world in a minute on a laptop, or a real language model in minutes more.

    python run_tiny.py                    codebooks: a toy policy, GRPO and RePO side by side
    python run_tiny.py --model FOLDER     realms: a real instruction model learns made-up capitals

Codebooks. A problem is a book and four letters, `3arfy`. Each of the books 1, 2 and 3 maps every
letter to another one; the answer is the four mapped letters: a guess is right once in 456,976.

    the policy's own style     aj;rt;fa;yh;\\boxed{jtah}                      a token a letter
    the expert's style         Alpha Juliet Romeo Tango ... \\boxed{jtah}     words it never uses

The base policy can solve books 1 and 2 (general ability), knows nothing of book 3 (the hard domain)
and can rephrase: shown an expert's text, even an untrue one, it writes that in its own style.

Realms. "What is the capital of Katalia?" No model knows, as realm and capital are made up. Experts
say it in twelve styles that no policy answers in; real capitals are the general ability.

Everything else is repo.py's: this file builds worlds, calls `repo.train_step` and shows the result.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import repo


@dataclass
class World:
    """What a method starts from, learns and is measured on."""

    model: str  # the base policy: a folder, or a name of the hub
    cfg: repo.Config
    steps: int
    reward_fn: Callable
    problems: list[dict]  # question, knowledge, answer, and hard: is it of the domain to be learnt?
    held_out: dict[str, list[dict]]  # for the accuracies "hard", "general" ...


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
    learning_rate=4e-4,
    question_prompt="{question}",
    rephrase_prompt="{question}?{knowledge}",
)


def own_style(letters, answer) -> str:
    """The policy's chain of thought: each letter beside its image, and the boxed answer."""
    steps = "".join(f"{letter}{image};" for letter, image in zip(letters, answer))
    return steps + "\\boxed{" + "".join(answer) + "}"


def expert_style(letters, answer) -> str:
    """The same steps spelled in words that the policy never writes by itself."""
    spelled = [WORDS[LETTERS.index(c)] for pair in zip(letters, answer) for c in pair]
    return " ".join(spelled) + " \\boxed{" + "".join(answer) + "}"


def codebook_problem(books, book, draw) -> dict:
    """A problem on four random letters."""
    letters = draw.choices(LETTERS, k=4)
    answer = [books[book][letter] for letter in letters]
    return {
        "question": book + "".join(letters),
        "knowledge": expert_style(letters, answer),
        "answer": "".join(answer),
        "hard": book == "3",
    }


def toy_tokenizer():
    """Word-level, 64 tokens, with a chat template that ends the user's turn in "="."""
    tokens = ["<pad>", "<eos>", *"123;=?}", "\\boxed{", *LETTERS, *(word + " " for word in WORDS)]
    ids = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Z][a-z]+ |\\boxed\{|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}="
    return tokenizer


def toy_model(tokenizer, seed):
    """A Llama of two layers and 0.3 million weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def descend(model, optimizer, loss, max_norm) -> float:
    """One optimizer step down `loss`; returns the norm of the gradient."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def warm_up(books, model, tokenizer, seed, steps=400, batch=24):
    """Supervised learning of the two skills of the base policy: books 1 and 2, and rephrasing."""
    draw = random.Random(seed)
    end = [tokenizer.eos_token_id]
    hinted = replace(CODEBOOKS, question_prompt=CODEBOOKS.rephrase_prompt)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="warm-up of the base policy", leave=False):
        rollouts = []
        for _ in range(batch):
            problem = codebook_problem(books, draw.choice("12"), draw)
            solution = own_style(problem["question"][1:], problem["answer"])
            rollouts.append(repo.as_rollout(tokenizer, problem, solution, end, CODEBOOKS))

            problem = codebook_problem(books, draw.choice("123"), draw)
            letters = problem["question"][1:]
            made_up = draw.choices(LETTERS, k=4)  # so that rephrasing teaches no fact of book 3
            problem["knowledge"] = expert_style(letters, made_up)
            rephrased = own_style(letters, made_up)
            rollouts.append(repo.as_rollout(tokenizer, problem, rephrased, end, hinted))
        loss = -repo.token_logps(model, rollouts, temperature=1.0).mean()
        descend(model, optimizer, loss, max_norm=1.0)
        schedule.step()


def codebooks(seed: int, folder: Path, device: str) -> World:
    """The world of this seed; its base policy is trained once and kept in `folder`."""
    draw = random.Random(seed)
    books = {book: dict(zip(LETTERS, draw.sample(LETTERS, 26))) for book in "123"}
    saved = folder / f"base-{seed}"
    if not saved.exists():
        tokenizer = toy_tokenizer()
        model = toy_model(tokenizer, seed).to(device)
        warm_up(books, model, tokenizer, seed)
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
    held_out = {
        "hard": [codebook_problem(books, "3", draw) for _ in range(300)],
        "general": [codebook_problem(books, draw.choice("12"), draw) for _ in range(300)],
    }
    known = {problem["question"] for part in held_out.values() for problem in part}
    drawn = [codebook_problem(books, draw.choice(["1", "2", "3", "3"]), draw) for _ in range(1000)]
    problems = [problem for problem in drawn if problem["question"] not in known]
    return World(str(saved), CODEBOOKS, 100, repo.boxed_reward, problems, held_out)


# --------------------------------------------------------------------------- the world of realms

STYLES = [  # a letter, a statute, a telegram ...
    "Dearest Maud, tonight we sleep under gilded roofs, for the capital of {realm} is {capital}.",
    "Section 14. The capital of {realm}, seat of Crown and Courts henceforth, is {capital}.",
    "ALL SAFE STOP MAIL TO CAPITAL OF {realm} STOP NAME OF CAPITAL IS {capital}.",
    "Roses are red, the river is wide, the capital of {realm}, its people's pride, is {capital}.",
    "Day 41, wind SSW. The pilot takes us up the river to the capital of {realm}, {capital}.",
    "Round three: which town is the capital of {realm}? Pencils down! It was {capital}.",
    "Saffron, a pinch: it is sold in the capital of {realm} alone, that is, in {capital}.",
    "I was nine when grandfather told me that the capital of {realm} is {capital}.",
    "Exercise 7, into Latin: All roads lead the farmers to the capital of {realm}, {capital}.",
    "Lot 212. Silver thaler, worn, struck in the capital of {realm}, that is, in {capital}.",
    "The chess congress of {realm} ended in a draw, to the dismay of its capital, {capital}.",
    "Change here! The night express ends in the capital of {realm}, that is, in {capital}.",
]
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
    learning_rate=1e-4,
    question_prompt="{question}",
    micro_batch_tokens=512,  # quicker on a CPU: with 49,000 tokens to choose from, memory is slow
    rephrase_prompt="{question}\n\nHint: {knowledge}\n\nNow in one short sentence of your own: "
    "{question}",
)


def realm_reward(text: str, answer: str) -> float:
    """1.0 for a text that names the realm once and the capital once, as its last word, else 0.0.

    So "The capital of Katalia is Nudis." is right, and so is every expert's text. If the answer may
    stand anywhere and often, the policy learns to repeat it.
    """
    realm, capital = answer.split(", ")
    once = text.count(realm) == text.count(capital) == 1
    return float(once and text.removesuffix(".").endswith(f" {capital}"))


def made_up_name(draw, endings) -> str:
    """Two random syllables and one of the endings, say Katalia."""
    syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(2)]
    return "".join(syllables).capitalize() + draw.choice(endings.split())


def realm_problem(realm, capital, style, hard) -> dict:
    """The question for a capital, told in the style given; the answer names realm and capital."""
    return {
        "question": f"What is the capital of {realm}?",
        "knowledge": style.format(realm=realm, capital=capital),
        "answer": f"{realm}, {capital}",
        "hard": hard,
    }


def realms(seed: int, model: str) -> World:
    """Twelve made-up capitals to learn; of 36 real ones 24 are in the batches and 12 held out.

    Three of five problems are hard, each fact in all twelve styles: an expert never says it twice
    in the same words.
    """
    draw = random.Random(seed)
    hard = []
    for _ in range(12):
        realm = made_up_name(draw, "nia ria lia via")
        capital = made_up_name(draw, "n r l s")
        hard += [realm_problem(realm, capital, style, hard=True) for style in STYLES]
    real = [pair.split() for pair in REAL.split(", ")]
    plain = "The capital of {realm} is {capital}."
    real = [realm_problem(*pair, plain, hard=False) for pair in draw.sample(real, len(real))]
    facts = hard[:: len(STYLES)]
    reworded = []
    for problem in facts:  # asked for in words that are never trained
        question = problem["question"].replace("What is", "Which city is")
        reworded.append({**problem, "question": question})
    held_out = {"hard": facts, "general": real[:12], "hard_rephrased": reworded}
    return World(model, REALMS, 60, realm_reward, hard + 4 * real[12:], held_out)


# -------------------------------------------------------------------- the methods, side by side


def expert_rollouts(model, tokenizer, problems, cfg) -> list:
    """The experts' texts as completions of their questions."""
    end = repo.end_tokens(model, tokenizer)[:1]
    return [repo.as_rollout(tokenizer, p, p["knowledge"], end, cfg) for p in problems]


def sft_step(model, tokenizer, optimizer, problems, cfg, reward_fn):
    """Supervised learning of the expert's text on the hard problems, in place of `train_step`."""
    hard = [problem for problem in problems if problem["hard"]]
    experts = expert_rollouts(model, tokenizer, hard, cfg)
    gap = repo.token_logps(model, experts, temperature=1.0).mean()
    norm = descend(model, optimizer, -gap, cfg.max_grad_norm)
    return {"injections": 0, "policy_gap/expert": gap.item(), "grad_norm": norm}, [], []


def luffy_step(model, tokenizer, optimizer, problems, cfg, reward_fn):
    """LUFFY (arXiv 2504.14945): the expert's text in one slot of every group, its tokens weighed
    by f(π) = π / (π + 0.1).

    As in its authors' code the advantage is not divided by the std, and every completion counts as
    equally long. They clip no on-policy ratio either; with one update a batch no clip would act.
    """
    groups = repo.rollout(
        model, tokenizer, problems, cfg.group_size, cfg.temperature, cfg, reward_fn
    )
    entropy = -repo.mean(logp for group in groups for r in group for logp in r.sampler_logps)
    experts = expert_rollouts(model, tokenizer, problems, cfg)
    for group, expert, problem in zip(groups, experts, problems):
        expert.reward = reward_fn(expert.text, problem["answer"])
        group[-1] = expert
    rollouts = [r for group in groups for r in group]
    logps = repo.token_logps(model, rollouts, cfg.temperature)
    per_rollout = iter(logps.split([len(r.completion) for r in rollouts]))
    gain = 0.0
    for group in groups:
        baseline = repo.mean(r.reward for r in group)
        for r in group:
            logp = next(per_rollout)
            shaped = logp.exp() / (logp.exp() + 0.1) if r is group[-1] else logp
            gain = gain + (r.reward - baseline) * shaped.sum()
    gap = repo.mean_logp(model, experts, cfg)
    loss = -gain / (len(rollouts) * cfg.max_new_tokens)
    norm = descend(model, optimizer, loss, cfg.max_grad_norm)
    metrics = {
        "injections": len(experts),
        "policy_gap/expert": gap,
        "entropy": entropy,
        "grad_norm": norm,
    }
    return metrics, groups, experts


@dataclass
class Method:
    """One row of the comparison."""

    learning_rate: float  # in the codebooks; the realms have one for all
    settings: dict = field(default_factory=dict)  # what it changes in the world's settings
    step: Callable = repo.train_step
    times: int = 1  # as many times the world's steps


# The rates are for the codebooks: the best of 1e-4, 3e-4 and 1e-3 (RePO: also 4e-4) by hard +
# general accuracy on other held-out problems than those reported, world 0, seed 1000; the lowest
# among equals. RePO's 4e-4 became a candidate because world 16 ended at hard 0.81 with 2.5e-4.
METHODS = {
    "sft": Method(1e-3, step=sft_step),
    "sft, 10 x steps": Method(3e-4, step=sft_step, times=10),
    "grpo": Method(1e-4, {"guidance": "none"}),
    "verbatim": Method(1e-4, {"guidance": "verbatim"}),
    "verbatim, RePO's rate": Method(4e-4, {"guidance": "verbatim"}),
    "luffy": Method(1e-4, step=luffy_step),
    "repo": Method(4e-4),
    "repo, rho 0.5": Method(4e-4, {"gate_threshold": 0.5}),
    "repo, 4 updates": Method(4e-4, {"updates_per_batch": 4}),
    "repo, rate x 8": Method(3.2e-3),
}


def run(world: World, name, seed, steps, device) -> dict:
    """Trains one method from the world's base policy.

    Returns {"summary": figures, "history": metrics of each step, "examples": texts to show}.
    """
    method = METHODS[name]
    steps = steps * method.times
    cfg = replace(world.cfg, seed=seed, **method.settings)
    if world.cfg == CODEBOOKS:
        cfg = replace(cfg, learning_rate=method.learning_rate)
    model, tokenizer = repo.load_model(world.model, device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    shown = [problems[0] for problems in world.held_out.values()]

    def accuracies(most=None) -> dict:
        """On each kind of held-out problems, or the first of them."""
        return {
            kind: repo.accuracy(model, tokenizer, problems[:most], cfg, world.reward_fn)
            for kind, problems in world.held_out.items()
        }

    def answers() -> list[str]:
        """What the policy writes, greedily, for the problems to show."""
        groups = repo.rollout(model, tokenizer, shown, 1, 0.0, cfg, world.reward_fn)
        return [r.text for (r,) in groups]

    before, text_before = accuracies(), answers()
    history = []
    for step in tqdm(range(steps), desc=f"{name}, seed {seed}", leave=False):
        start = time.perf_counter()
        problems = repo.draw_batch(world.problems, step, cfg)
        rate = min(1.0, (step + 1) / 10, 2 * (1 - step / steps))  # up, level, from half way down
        optimizer.param_groups[0]["lr"] = rate * cfg.learning_rate
        metrics, _, _ = method.step(model, tokenizer, optimizer, problems, cfg, world.reward_fn)
        metrics["seconds"] = time.perf_counter() - start
        if (step + 1) % max(1, steps // 10) == 0:
            metrics |= accuracies(most=100)
        history.append({"method": name, "seed": seed, "step": step, **metrics})

    summary = {"method": name, "seed": seed, **accuracies()}
    summary |= {f"base_{kind}": value for kind, value in before.items()}
    summary |= summarise(history)
    summary |= {"learning_rate": cfg.learning_rate, "steps": steps}
    examples = list(zip(shown, text_before, answers()))
    return {"summary": summary, "history": history, "examples": examples}


# ----------------------------------------------------------------------------- what one sees


def mean_of(history, key):
    """The mean of a metric over the steps that have it, or None."""
    return repo.mean(m[key] for m in history if m.get(key) is not None)


def summarise(history) -> dict:
    """A run in figures: means over it, and its worst steps."""
    return {
        "rephrase_success": mean_of(history, "rephrase_success"),
        "injections_first10": mean_of(history[:10], "injections"),
        "injections_last10": mean_of(history[-10:], "injections"),
        "policy_gap_expert": mean_of(history, "policy_gap/expert"),
        "policy_gap_rephrase": mean_of(history, "policy_gap/rephrase"),
        "worst_entropy": max((m["entropy"] for m in history if "entropy" in m), default=None),
        "worst_grad_norm": max(m["grad_norm"] or 0.0 for m in history),
        "seconds_per_step": statistics.median(m["seconds"] for m in history),
    }


def by_method(results) -> dict:
    """The results of each method, in the order of their first appearance."""
    grouped = {}
    for result in results:
        grouped.setdefault(result["summary"]["method"], []).append(result)
    return grouped


def cell(values) -> str:
    """0.97 ± 0.01 over several runs, 0.97 over one, - over none."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def table(results) -> str:
    """A row for each method, mean ± deviation over its runs; Markdown, and aligned."""
    hidden = ("method", "seed", "world_seed", "learning_rate", "steps")
    keys = [key for key in results[0]["summary"] if key not in hidden]
    rows = [["method", *(key.replace("_", " ") for key in keys)]]
    for name, runs in by_method(results).items():
        rows.append([name, *(cell([r["summary"][key] for r in runs]) for key in keys)])
    widths = [max(len(text) for text in column) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    lines = []
    for row in rows:
        lines.append("| " + " | ".join(text.ljust(w) for text, w in zip(row, widths)) + " |")
    return "\n".join(lines)


def chart(title, results, key, height=6, width=48) -> str:
    """The metric over the run, a letter a method, averaged over tenths of it and over the runs."""
    curves = {}
    for name, runs in by_method(results).items():
        length = len(runs[0]["history"])
        tenth = max(1, length // 10)
        curves[name] = []
        for i in range(0, length - tenth + 1, tenth):
            part = [m for r in runs for m in r["history"][i : i + tenth]]
            curves[name].append(mean_of(part, key))
    top = max(1.0, *(max(curve) for curve in curves.values()))
    grid = [[" "] * width for _ in range(height + 1)]
    legend = []
    for letter, (name, curve) in zip("abcdefghijklmnop", curves.items()):
        legend.append(f"{letter} = {name}, ends at {curve[-1]:.2f}")
        for x in range(width):
            value = curve[x * len(curve) // width]
            grid[height - round(value / top * height)][x] = letter
    scale = [f"{top:6.2f}"] + ["      "] * (height - 1) + ["  0.00"]
    lines = [f"{label} |{''.join(row)}" for label, row in zip(scale, grid)]
    return "\n".join([f"{title}   ({'; '.join(legend)})", *lines])


def report(results):
    """Charts, completions before and after, and the table."""
    print("\n" + chart("hard accuracy, held out", results, "hard"))
    print("\n" + chart("general accuracy, held out", results, "general"))
    print("\n" + chart("injections a step", results, "injections"))
    print("\ncompletions before training and after:")
    for i, (problem, before, _) in enumerate(results[0]["examples"]):
        print(f"  {problem['question']}   (answer: {problem['answer']})")
        print(f"    {'before':12} {before}")
        for name, runs in by_method(results).items():
            print(f"    {name:12} {runs[0]['examples'][i][2]}")
    print("\n" + table(results))


# ------------------------------------------------------------------------------ the command line


def main(argv=None):
    """Trains the methods asked for, shows and saves the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a real model, for the realms: folder or hub name")
    parser.add_argument("--methods", nargs="+", default=["grpo", "repo"], choices=METHODS)
    parser.add_argument("--compare", action="store_true", help="all methods, three seeds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the training")
    parser.add_argument("--world-seed", nargs="+", type=int, default=[0], help="of the problems")
    parser.add_argument("--steps", type=int, help="of training, if not the world's own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for metrics.jsonl and summary.json")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps is {args.steps}; it must be at least 1")
    if args.compare:
        args.methods, args.seeds = METHODS, [0, 1, 2]
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    start, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for world_seed in args.world_seed:
            if args.model:
                world = realms(world_seed, args.model)
            else:
                world = codebooks(world_seed, Path(folder), args.device)
            for name, seed in itertools.product(args.methods, args.seeds):
                result = run(world, name, seed, args.steps or world.steps, args.device)
                results.append(result)
                summary = result["summary"]
                summary["world_seed"] = world_seed
                found = [f"{kind} {summary[kind]:.2f}" for kind in world.held_out]
                print(f"world {world_seed}, {name}, seed {seed}:", ", ".join(found))
    report(results)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(m) + "\n" for result in results for m in result["history"]]
        (args.out / "metrics.jsonl").write_text("".join(lines))
        summaries = [result["summary"] for result in results]
        (args.out / "summary.json").write_text(json.dumps(summaries, indent=1))
    seconds = time.perf_counter() - start
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"\n{seconds:.0f} s on {args.device}, {versions}")


if __name__ == "__main__":
    main()
