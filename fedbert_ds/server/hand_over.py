"""The end of a run: collect the client model, merge, save and evaluate it, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError, UserError, one_line, warn
from fedbert_ds.federation.averaging import NobodyDelivered
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.model.checkpoint import save_merged
from fedbert_ds.model.halves import write_body
from fedbert_ds.model.heads import auto_class
from fedbert_ds.run_file import dump_config
from fedbert_ds.server.evaluations import KeepBest
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.rooms import Rooms
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.evaluations import Evaluation, read_evaluations, write_evaluations
from fedbert_ds.telemetry.metrics import Summary, read_metrics, summary
from fedbert_ds.telemetry.progress import short_bytes
from fedbert_ds.telemetry.report import write_report
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import cut_to_json

ClientFigures = Sequence[pb.Saved]
KEPT_KEY = "federation.personal_parts: kept"
FIGURES = ("client peak memory", "client FLOP per token")
"""Facts of the report."""
BEST_EVALUATION = "evaluation.json"
"""File in the folder of the best model."""


def collect_client_model(rooms: Rooms, window: int) -> dict[str, Tensor]:
    """The client model before `window`, fp32 by name, on every rank.

    It is the aggregator's. Where the strategy says so, parts of it are what the clients' become
    together: as the updates of a window, by masked tokens that the server has counted, and none
    farther from the reference than the bound allows. Raises RunError, on every rank, when no client
    is left to hand one over.
    """
    assert rooms.aggregator is not None and rooms.combiner is not None
    reference = rooms.aggregator.reference().weights
    if rooms.strategy.result_is_reference:
        return reference
    mine = sorted(rooms.queue.clients)
    collected = rooms.inbox.collected
    rooms.inbox.expect_collected(window)
    request = pb.ServerMessage(update_request=pb.UpdateRequest(window=window))
    rooms.service.ask(mine, Question("client model", window), request, collected)
    totals = rooms.masked_counts.totals(mine)
    halves = {
        client: ClientUpdate(collected[client], float(max(1, totals.get(client, 0))))
        for client in mine
        if client in collected
    }
    try:
        return reference | rooms.combiner.result(halves, rooms.contract.handed_over, reference)
    except NobodyDelivered:
        raise RunError(
            f"no client was left to hand over its half; window {window} is saved: start the clients again and "
            "add --resume"
        ) from None


def hand_over(
    rooms: Rooms,
    config: RunConfig,
    window: int,
    is_complete: bool,
    figures: ClientFigures,
    model_config: Any,
    tokenizer: Any,
    facts: dict[str, str],
    evaluations: Sequence[Evaluation] = (),
) -> None:
    """Tell clients that the run is over; save the merged model, evaluate it, write the report.

    All ranks call it. `figures` are the last Saved messages of this rank's clients. `facts` open
    the report's table. A run that is not complete is merged and reported, not evaluated.
    `evaluations` are those while it trained. Raises as `collect_client_model`.
    """
    folder = RunFolder(config.run.directory)
    client_model = None if rooms.remote is not None else collect_client_model(rooms, window)
    if rooms.remote is not None:
        _collect_elsewhere(rooms, window, is_complete)
    body = rooms.engine.full_state()
    reason = "the run is complete" if is_complete else f"the run was stopped and saved at window {window}"
    rooms.service.finish(reason, is_complete)
    mine = [(saved.peak_memory_bytes, saved.flops_per_token) for saved in figures]
    all_figures = rooms.rank_group.gather(mine, list[tuple[int, float]])
    if rooms.rank_group.rank != 0:
        return
    if rooms.remote is not None:
        rooms.remote.finish(reason, is_complete)
        write_body(folder.body, body, model_config, cut_to_json(config.cut), window, tokenizer)
        facts = facts | {"client updates": "by an aggregator of another party, their bytes not counted here"}
    if client_model is not None:
        save_merged(folder.model, model_config, client_model, body, tokenizer)
    facts = facts | _costs(folder, [pair for pairs in all_figures for pair in pairs])
    judged: dict[str, str] = {}
    baselines: dict[str, float] = {}
    if rooms.strategy.has_kept_parts:
        judged = {"held-out loss": f"not of a model without its clients' own parts ({KEPT_KEY})"}
    elif is_complete and client_model is not None and folder.held_out.is_file():
        judged, baselines = _judge(folder, config, tokenizer, model_config)
    facts = facts | judged
    if evaluations:
        facts["held out by clients"] = f"{evaluations[-1].sentence}, before window {evaluations[-1].window}"
    write_report(folder.path, dump_config(config), read_metrics(folder.metrics), facts, baselines, evaluations)
    if FIGURES[0] in facts:
        print(f"clients {facts[FIGURES[0]]} peak memory, {facts[FIGURES[1]]} FLOP per token")
    rate = facts.get("rate of the body")
    print(f"time    {facts['time']}" + (f"; {rate}" if rate else ""))
    if client_model is not None:
        _tell_model(folder, rooms, config, model_config)
    else:
        print(_where_the_halves_are(folder, rooms))
    _tell_end(folder, config, window, is_complete)


def _judge(
    folder: RunFolder, config: RunConfig, tokenizer: Any, model_config: Any
) -> tuple[dict[str, str], dict[str, float]]:
    """The finished model on text that no client had: facts, and losses to draw beside the run's. A
    text or a machine that does not do for it is told, and the run is complete without the loss.
    """
    try:
        if config.task.is_labelled:
            return _evaluate_task(folder, config), {}
        losses = _evaluate(folder, config, tokenizer, model_config.vocab_size)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        reason = one_line(str(error)) or type(error).__name__
        warn(f"no held-out loss: {reason}")
        return {"held-out loss": f"missing: {reason}"}, {}
    held_out, unigram = losses["held out, at the end"], losses["word frequency alone"]
    print(f"held-out loss {held_out:.2f}, word frequency alone {unigram:.2f}: {beyond_frequency(unigram - held_out)}")
    facts = {"held-out loss": f"{held_out:.3f} nats a masked token", "word frequency alone": f"{unigram:.3f} nats"}
    return facts, losses


def beyond_frequency(nats: float) -> str:
    """What a held-out loss says that is so much below that of word frequency alone."""
    if not nats < 0.0:
        return f"{nats:.2f} nats learned beyond it"
    return f"{-nats:.2f} nats worse than it; train for more windows, or look at the report's losses"


def _tell_model(folder: RunFolder, rooms: Rooms, config: RunConfig, model_config: Any) -> None:
    loaded = f'{auto_class(model_config).__name__}.from_pretrained("{folder.model}")'
    print(f"model   {folder.model}   a transformers checkpoint: {loaded}")
    if rooms.strategy.has_kept_parts:
        averaged = config.federation.average_scope
        print(f"        all but body and {averaged} is as the run began: each client keeps its own ({KEPT_KEY})")


def _tell_end(folder: RunFolder, config: RunConfig, window: int, is_complete: bool) -> None:
    if config.run.keep_best:
        for best in read_evaluations(folder.best_model / BEST_EVALUATION):
            print(f"best    {folder.best_model}   before window {best.window}: {best.sentence}")
            print(f"        {folder.model} is the model after the last window")
    if is_complete and window < config.run.windows:
        print(
            f"stopped early, before window {window} of {config.run.windows}: {config.run.early_stopping_patience} "
            "evaluations in a row were no better (run.early_stopping_patience)"
        )
    state = "complete" if is_complete else f"stopped and saved at window {window}; continue with --resume"
    print(f"report  {folder.report}   {state}", flush=True)


def best_model_keeper(rooms: Rooms, folder: RunFolder, model_config: Any, tokenizer: Any) -> KeepBest:
    """Writes the merged model before an evaluation's window, as `hand_over` does the last one."""

    def keep(evaluation: Evaluation) -> bool:
        try:
            client_model = collect_client_model(rooms, evaluation.window)
        except RunError:
            return False  # every client was lost; the run waits for them or ends
        finally:
            # Later updates of this window are updates again.
            rooms.inbox.expect_collected(-1)
        if any(rooms.rank_group.gather(bool(rooms.membership.absent), bool)):
            return False
        body = rooms.engine.full_state()
        if rooms.rank_group.rank == 0:
            save_merged(folder.best_model, model_config, client_model, body, tokenizer)
            write_evaluations(folder.best_model / BEST_EVALUATION, [evaluation])
        return True

    return keep


def _collect_elsewhere(rooms: Rooms, window: int, is_complete: bool) -> None:
    """Have the aggregator of another party write the client model. All ranks call it."""
    assert rooms.remote is not None
    mine = rooms.masked_counts.totals(rooms.members.at(rooms.rank_group.rank))
    totals = rooms.rank_group.gather(mine, dict[str, int])
    if rooms.rank_group.rank == 0:
        rooms.remote.conclude(window, is_complete, {client: n for counts in totals for client, n in counts.items()})
    # Clients stay until it has their halves.
    rooms.remote.await_result(rooms.service.attend)
    rooms.rank_group.barrier()


def _where_the_halves_are(folder: RunFolder, rooms: Rooms) -> str:
    assert rooms.remote is not None
    return (
        f"body    {folder.body}   the aggregator has {rooms.remote.result}; where both parties agree: fedbert-ds merge "
        f"--body {folder.body} --client-model FILE --out hf, and for its held-out loss: fedbert-ds eval --model hf"
    )


def _costs(folder: RunFolder, figures: Sequence[tuple[int, float]]) -> dict[str, str]:
    totals = summary(read_metrics(folder.metrics))
    return {
        "time": time_sentence(totals),
        "bytes per token": (
            f"{short_bytes(totals.bytes_per_token_up)} up, {short_bytes(totals.bytes_per_token_down)} down, "
            f"{short_bytes(totals.update_bytes_per_token)} of client updates"
        ),
    } | _of_clients(figures)


def _of_clients(figures: Sequence[tuple[int, float]]) -> dict[str, str]:
    """What clients said of (peak memory, FLOP per token) when they saved; nothing of a run that was
    complete before it was resumed, for then none of them trained.
    """
    if not any(flops for _, flops in figures):
        return {}
    memory, flops = (max(column) for column in zip(*figures, strict=True))
    return dict(zip(FIGURES, (short_bytes(memory), f"{flops / 1e6:.2f} M"), strict=True))


def time_sentence(totals: Summary) -> str:
    """Where the ranks' time went; the shares make 100 %."""
    parts = {
        "body computing": totals.busy_share,
        "waiting for clients": totals.wait_share,
        "for other ranks": totals.rank_wait_share,
        "saving": totals.saving_share,
        "evaluating": totals.evaluation_share,
        "host": totals.host_share,
    }
    if not totals.evaluation_share:
        del parts["evaluating"]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in parts.items())


def _evaluate_task(folder: RunFolder, config: RunConfig) -> dict[str, str]:
    """The merged model's loss and measures on held-out examples, told and as facts."""
    from fedbert_ds.evaluation.labelled import evaluate_task

    result = evaluate_task(folder.model, [str(folder.held_out)], sequence_length=config.data.sequence_length)
    measures = ", ".join(f"{name} {value:.3f}" for name, value in result.measures.items())
    print(f"held-out loss {result.loss:.3f}, {measures}, of {result.labels:,} labels")
    return {"held-out loss": f"{result.loss:.3f} a label", "held-out measures": measures}


def _evaluate(folder: RunFolder, config: RunConfig, tokenizer: Any, vocab_size: int) -> dict[str, float]:
    """Held-out losses, nats per masked token: of word frequency alone, and of the merged model."""
    from fedbert_ds.data.corpus import read_articles
    from fedbert_ds.data.long_steps import telling
    from fedbert_ds.data.masking import encode
    from fedbert_ds.evaluation.masked_lm import evaluate_masked_lm

    length = config.data.sequence_length
    shards = sorted(str(path) for path in folder.clients.glob("*/shard.jsonl"))
    articles = telling(read_articles(shards), "text    counting tokens", lambda article: len(article.text))
    counts = encode(articles, tokenizer, length).token_counts(vocab_size)
    result = evaluate_masked_lm(
        folder.model,
        [str(folder.held_out)],
        seed=config.run.seed,
        mask_probability=config.data.mask_probability,
        sequence_length=length,
        train_counts=counts,
    )
    assert result.unigram_loss is not None
    return {"word frequency alone": result.unigram_loss, "held out, at the end": result.loss}
