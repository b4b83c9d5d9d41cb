"""What a schedule must have come to, computed without any of the product's rooms.

Plain loops over windows and clients: the sums are those of training in one place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from simulation import arithmetic
from simulation.arithmetic import text
from simulation.client import HALF
from simulation.play import Ended, Play

from fedbert_ds.federation.strategy import strategy_of_run


@dataclass
class Undisturbed:
    """A run that nothing happens to."""

    totals: list[int] = field(default_factory=list)
    """The body's gradient in each window."""
    tokens: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    body: int = 0
    reference: float = 0.0
    halves: dict[str, float] = field(default_factory=dict)
    cursors: dict[str, int] = field(default_factory=dict)


def undisturbed(play: Play, tokens: Mapping[str, int], participants: Iterable[frozenset[str]]) -> Undisturbed:
    """The run of these participants, window by window, with a client's `tokens` in each."""
    config = play.config
    strategy = strategy_of_run(config)
    run = Undisturbed(halves=dict.fromkeys(tokens, 0.0), cursors=dict.fromkeys(tokens, 0))
    common = 0.0
    since: dict[str, int] = {}
    for window, clients in enumerate(participants):
        batches = {c: arithmetic.batch(c, run.cursors[c], max(tokens[c], 1)) for c in sorted(clients)}
        texts = {client: [text(client, place) for place in batch] for client, batch in batches.items()}
        all_masked = sum(one.masked for many in texts.values() for one in many)
        total, loss = 0, 0.0
        shares: dict[str, int] = {}
        for client, many in texts.items():
            half, share = run.halves[client], 0
            for one in many:
                if strategy.trains_alone:
                    value = arithmetic.alone(one.number, half)
                    share += value
                    loss += arithmetic.loss(value, one.masked)
                    continue
                sent = arithmetic.activation(one.number, half)
                state = arithmetic.hidden(sent, run.body)
                answer = arithmetic.gradient(one.number, half, state, all_masked)
                total += arithmetic.of_body(answer, sent)
                share += arithmetic.of_half(answer, arithmetic.input_gradient(answer, sent, run.body))
                loss += arithmetic.loss(state, one.masked)
            shares[client] = share
            run.cursors[client] = batches[client].stop
        if not strategy.trains_alone:
            run.body = arithmetic.stepped_body(run.body, total)
        run.totals.append(total)
        run.tokens.append(sum(one.length for many in texts.values() for one in many))
        run.masked.append(all_masked)
        run.losses.append(loss)
        if strategy.exchange_after(window) == "gradients":
            run.reference = arithmetic.stepped_half(run.reference, sum(shares.values()))
            run.halves = dict.fromkeys(tokens, run.reference)
            continue
        for client, share in shares.items():
            run.halves[client] = arithmetic.stepped_half(run.halves[client], share)
            since[client] = since.get(client, 0) + sum(one.masked for one in texts[client])
        if strategy.exchange_after(window) == "weights":
            sent_halves = {c: run.halves[c] for c in clients}
            if strategy.sends_changes:
                sent_halves = {c: arithmetic.fp32(half - common) for c, half in sent_halves.items()}
            weights = {c: float(max(strategy.least_weight, since[c])) for c in clients}
            if clients and not sum(weights.values()):
                weights = dict.fromkeys(weights, 1.0)
            if clients:
                mean = sum(weights[c] * sent_halves[c] for c in clients) / sum(weights.values())
                mean = arithmetic.fp32(mean)
                common = arithmetic.fp32(common + mean) if strategy.sends_changes else mean
            since.clear()
            run.reference = common
            run.halves = dict.fromkeys(tokens, common)
    return run


def check(play: Play) -> None:
    """AssertionError, with what differs, for a run that did not come to what it must."""
    last = play.last
    assert last is not None
    windows = play.config.run.windows
    assert [window for window, _ in play.log] == list(range(windows)), "each window is reported once, in order"
    ends = [last.ended[rank] for rank in range(last.num_ranks)]
    for end in ends:
        assert end.rooms.inbox.is_empty, "of windows that are over nothing is left"
        assert not end.rooms.queue.schedule.windows, "a window is left"
        assert end.body.state == ends[0].body.state, "ranks have different bodies"
        assert _reference(end) == _reference(ends[0]), "ranks have different client models"
        if play.strategy.exchange_after(windows - 1) != "nothing":
            assert _reference(end)[0] == windows, "the client model is of another window"
    _check_counts(play, ends[0])
    if play.schedule.waits:
        _check_waits(play, ends)


def _reference(end: Ended) -> tuple[int, float]:
    reference = end.aggregator.reference()
    return reference.version, float(reference.weights[HALF][0])


def _check_counts(play: Play, end: Ended) -> None:
    """What is planned is trained or told as lost, and no sequence is trained twice in the run."""
    steps = end.body.state.steps
    assert [step.window for step in steps] == [window for window, _ in play.log], "each window is one step"
    trained = Counter(sequence for step in steps for sequence in step.trained)
    twice = [sequence for sequence, count in trained.items() if count > 1]
    assert not twice, f"trained twice: {twice}"
    for step, (window, tallies) in zip(steps, play.log, strict=True):
        lost = sum(tally.lost_masked_tokens for tally in tallies)
        reported = sum(tally.masked_tokens for tally in tallies)
        all_masked = step.planned if play.strategy.trains_alone else step.all_masked
        assert reported + lost == all_masked, f"window {window}: {reported} + {lost} of {all_masked} masked tokens"
        if not play.strategy.trains_alone:
            masked = sum(text(*sequence).masked for sequence in step.trained)
            assert reported == masked, f"window {window}: {reported} of {masked} masked tokens are reported"
        assert not lost or play.told, f"window {window}: nobody was told of {lost} lost tokens"


def _check_waits(play: Play, ends: list[Ended]) -> None:
    """A run that waits has lost nothing, and is what it would have been undisturbed."""
    assert play.last is not None and play.last.members is not None
    members, windows = play.last.members, play.config.run.windows
    assert not any(tally.lost_masked_tokens for _, tallies in play.log for tally in tallies), "tokens were lost"
    if len(play.machines) > play.config.clients.expected and play.num_starts > 1:
        return  # newcomers had their turns by the rules of an earlier start
    takes_part = members.sampler.takes_part
    participants = [frozenset(c for c in members.seats if takes_part(c, window)) for window in range(windows)]
    run = undisturbed(play, members.tokens, participants)
    cursors: dict[str, int] = dict.fromkeys(members.seats, 0)
    for end in ends:
        here = members.at(end.body.rank)
        cursors |= {c: cursor["position"] for c, cursor in end.rooms.cursors.committed.items() if c in here}
    assert cursors == run.cursors, "cursors"
    told = [(sum(t.tokens for t in tallies), sum(t.masked_tokens for t in tallies)) for _, tallies in play.log]
    assert told == list(zip(run.tokens, run.masked, strict=True)), "tokens and masked tokens of each window"
    if play.is_anew:
        return
    assert [sum(t.loss_sum for t in tallies) for _, tallies in play.log] == run.losses, "losses"
    if not play.strategy.trains_alone:
        assert [step.total for step in ends[0].body.state.steps] == run.totals, "gradients of the body"
        assert ends[0].body.state.weights == run.body, "the body"
    assert _reference(ends[0])[1] == run.reference, "the client model"
