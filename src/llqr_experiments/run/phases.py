"""What a run does between its steps: refits, evaluations, translations, reports."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.markup import escape

import llqr
from llqr.typing import Array, Params, PyTree
from llqr_experiments import processes
from llqr_experiments.errors import ConfigError
from llqr_experiments.record import fields, insight, measures
from llqr_experiments.record.translations import FILE, append
from llqr_experiments.run import translate
from llqr_experiments.run.checkpoint import BEST, find, load_fields, steps
from llqr_experiments.run.evaluate import Histograms, evaluate
from llqr_experiments.run.job import Job, title
from llqr_experiments.run.session import HISTOGRAMS, Desk, Session, check_health, keep_best
from llqr_experiments.run.step import TrainState
from llqr_experiments.task import tasks


def refit(job: Job, session: Session, training: dict[str, Any], desk: Desk) -> None:
    """Relearn P before the update of this step, and say what it did."""
    config, clock, state = job.config, desk.clock, session.state
    with clock.phase("training"):
        jax.block_until_ready(state)  # earlier steps are not the refit's time
    before = clock.seconds["refit"]
    with clock.phase("refit"):
        batch, objective = refit_objective(job, session.refits, state.statistics)
        opt_state = llqr.refresh(job.recipe.tx, state.opt_state, state.params, objective)
        if job.layout is not None:  # whatever the refit has made of it
            onto = jax.tree.map(lambda x: x.sharding, state.opt_state)
            opt_state = jax.device_put(opt_state, onto)
        jax.block_until_ready(opt_state)
    seconds = clock.seconds["refit"] - before
    with clock.phase("insight"):
        skew = config.measure_asymmetry
        report = llqr.inspect(job.recipe.tx, opt_state, state.params, asymmetry=skew)
        assert isinstance(report, llqr.Report)
        ours, theirs = (_bound(job, given, state) for given in (batch, training))
        cosine = insight.gradient_cosine(ours, theirs, state.params)
        length = insight.step_length(job.recipe.tx, opt_state, theirs, state.params)
        record = insight.refit_record(report, float(cosine), float(length))
    desk.display.refit(session.step, report, seconds)
    desk.log(session.step, record)
    session.state = state._replace(opt_state=opt_state)


def refit_objective(
    job: Job, refits: Iterator[dict[str, Any]], statistics: PyTree
) -> tuple[dict[str, Any], llqr.BoundObjective]:
    """Return the next refit batch, and the objective of a refit: on as many batches as it takes."""
    batch = seen = next(refits)
    if job.config.multibatch_training:  # one for every inner step, on an axis of their own
        steps = job.config.precond_steps
        more = [next(refits) for _ in range(steps - 1)]
        seen = jax.tree.map(lambda *leaves: np.stack(leaves), batch, *more)
        statistics = jax.tree.map(lambda x: np.stack([x] * steps), statistics)
        statistics = job.put(statistics, axis=1) if job.layout else statistics
    batch, seen = job.put(batch), job.put(seen, int(seen is not batch))
    return batch, tasks.bound(job.task, seen, statistics)


def _bound(job: Job, batch: dict[str, Any], state: TrainState) -> llqr.BoundObjective:
    """The objective in inference mode, as refits see it."""
    return tasks.bound(job.task, batch, state.statistics)


def evaluation(job: Job, session: Session, desk: Desk) -> dict[str, float]:
    """Evaluate, keep the best, and return the metrics."""
    config, step = job.config, session.step
    check_health(job, session.state, desk)
    histograms = Histograms() if config.record_histograms else None
    with desk.clock.phase("evaluation"):
        made, size = job.task.material, job.multiple(config.eval_batch_size or config.batch_size)
        splits = {name: name for name in made.evaluated}
        splits |= {"train_eval": "train"} if config.add_train_eval else {}
        model = session.state.params, session.state.statistics
        found = {}
        for name, split in splits.items():
            batches = made.streams.evaluation(split, size, job.share)
            totals = evaluate(job.task.objective, model, batches, histograms, name, job.layout)
            found |= made.rates(name, totals)
    if histograms is not None and processes.first():
        try:
            histograms.write(desk.out_dir / HISTOGRAMS, step)
        except (OSError, ValueError) as error:  # a full disk; losses that are not finite
            desk.display.say(f"[yellow]warning:[/] no histograms of step {step}: {error}")
    _reached(job, session, found)
    desk.display.evaluation(step, found)
    desk.log(step, found | session.reached)
    keep_best(job, session, found, desk)
    return found | session.reached


def _reached(job: Job, session: Session, found: dict[str, float]) -> None:
    """Record the first evaluation at which an accuracy is reached."""
    made = job.task.material
    for share in made.milestones:
        name = f"{made.evaluated[0]} accuracy"
        if found[name] >= share:
            session.reached.setdefault(measures.first_step(name, share), session.step)


def translations(job: Job, session: Session, desk: Desk) -> dict[str, float]:
    """Translate the valid set, or a sample of it, where that is due; return the metrics."""
    options, step, last = job.config.translation_eval, session.step, session.step == job.last
    if not options.enabled or not (step or last):
        return {}
    every = job.config.test_eval_freq if options.freq is None else options.freq
    full = last and options.full_eval_at_end
    full = full or bool(options.full_eval_freq and step % options.full_eval_freq == 0)
    if not full and not (every and step % every == 0):
        return {}
    check_health(job, session.state, desk)
    name, most = ("bleu", None) if full else ("bleu_sampled", options.max_examples)
    found = _translate(job, session.state.params, "valid", most, step, desk)
    values = translate.record("valid", name, found)
    keep_best(job, session, values, desk)
    if full and job.goal.metric == "valid bleu":
        values["best valid bleu"] = session.best["value"]
        values["best valid bleu step"] = session.best["step"]
    desk.log(step, values)
    return values


def closing_translations(job: Job, session: Session, desk: Desk) -> dict[str, float]:
    """Translate the test set with the best parameters, which is done once, in the end."""
    if not job.config.translation_eval.enabled:
        return {}
    params, step = _best_params(job, session, desk)
    values = translate.record("test", "bleu", _translate(job, params, "test", None, step, desk))
    desk.log(job.last, values)
    return values


def _best_params(job: Job, session: Session, desk: Desk) -> tuple[Params, int]:
    """Return the parameters of the best evaluation, and its step; the last if there is none."""
    last, say = session.state.params, desk.display.say
    best = int(session.best.get("step", session.step))
    if best == session.step or not job.config.checkpoint_freq:
        return last, session.step
    desk.checkpoints.wait()
    # It may be of the run that this one goes on from.
    for run in (desk.checkpoints.folder, job.config.resume):
        try:
            if run is not None and best in steps(folder := find(Path(run)), BEST):
                found, step = load_fields(folder, {"params": last}, say, kind=BEST)
                if step == best:
                    return found["params"], step
        except ConfigError:  # gone, or damaged, which was said
            continue
    say(
        f"[yellow]warning:[/] the best checkpoint, of step {best}, cannot be read: the test set "
        "is translated with the last parameters."
    )
    return last, session.step


def _translate(
    job: Job, params: Params, split: str, most: int | None, step: int, desk: Desk
) -> translate.Translated:
    """Translate, and show and write what came out."""
    config, task, say = job.config, job.task, desk.display.say
    options = config.translation_eval
    assert task.decoder is not None
    assert task.material.pairs is not None
    follow = partial(desk.display.follow, what=f"translating {split}", every=options.progress_freq)
    with desk.clock.phase("translation"):
        found = translate.translate(
            task.decoder,
            params,
            task.material.pairs,
            split,
            options,
            batch_size=config.eval_batch_size or 128,
            most=most,
            follow=follow,
            layout=job.layout,
        )
    say(
        f"step {step:>6}   {split} BLEU [bold]{found.bleu.score:.2f}[/] on {found.examples:,} "
        f"sentences   {found.bleu.signature}"
    )
    for sample in found.samples if options.print_samples else ():
        say(f"{'':>14}source      {escape(sample.source)}")
        say(f"{'':>14}translation {escape(sample.hypothesis)}")
        say(f"{'':>14}reference   {escape(sample.reference)}")
    if not processes.first():
        return found
    try:
        path, bleu = desk.out_dir / FILE, found.bleu
        append(path, step, split, bleu.score, bleu.signature, found.samples)
    except OSError as error:
        say(f"[yellow]warning:[/] the translations of step {step} are not written: {error}")
    return found


def solution(job: Job, state: TrainState, desk: Desk) -> None:
    """Draw the solution of an equation in two variables, as the network has it."""
    made = job.task.material
    if len(made.axes) != 2:
        return
    size = job.multiple(job.config.eval_batch_size or job.config.batch_size)
    forward = jax.jit(job.task.objective.forward)
    parts = []
    with desk.clock.phase("evaluation"):
        for batch in made.streams.evaluation("test", size):
            given = {**job.put(batch), tasks.STATISTICS: state.statistics}
            found = np.asarray(job.whole(forward(state.params, given)))
            parts.append([x[batch["mask"]] for x in (batch["x"], batch["label"], found)])
    x, exact, found = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not processes.first():
        return
    try:
        fields.write(fields.draw(x, exact, found, made.axes, title(job.config)), desk.out_dir)
    except (OSError, ValueError) as error:
        desk.display.say(f"[yellow]warning:[/] the solution is not drawn: {error}")


def report(job: Job, step: int, state: TrainState, sums: dict[str, Array], desk: Desk) -> None:
    """Log and show what training measured before the update to `step`."""
    totals = {name: float(total) for name, total in jax.device_get(sums).items()}
    rates = job.task.material.rates("train", totals)
    values = rates | sharpness(state)
    if job.config.precond_streaming and job.config.use_preconditioner:
        values |= insight.streaming_record(llqr.find(state.opt_state).refit)
    if job.config.exact_steps:
        values |= insight.exact_record(state.opt_state)
    if job.recipe.skip:
        values["skipped steps"] = float(state.health.bad_steps)
    desk.log(step, values)
    with desk.clock.phase("logging"):
        desk.display.progress(step, values)
    check_health(job, state, desk)


def sharpness(state: TrainState) -> dict[str, float]:
    """What is logged of SAM."""
    return {} if state.sharpness is None else insight.sharpness_record(state.sharpness.info)


def quality(job: Job, state: TrainState, step: int, desk: Desk) -> llqr.Quality:
    """Compare the steps of `config.quality` with the exact one, on the first refit batch."""
    config, batch = job.config, next(job.task.material.streams.refits(job.config))
    batch, state = job.put(batch), state._replace(params=job.whole(state.params))
    with desk.clock.phase("quality"):
        found = insight.measure(config, _bound(job, batch, state), state.params)
    desk.display.say(f"\nstep {step:>6}   steps compared with the exact one\n{found}\n")
    desk.log(step, insight.metrics(found))
    return found
