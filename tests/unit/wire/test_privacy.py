"""What a client can say at all: a list of every field, each with the reason why it may leave the
client.

A new field in what a client sends fails here until somebody has written down why it gives no text
away. Token ids, label ids and text have no field; a field wide enough to hold them by another name
must say what keeps them out.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from fedbert_ds.wire import fedbert_pb2 as pb

ALLOWED: dict[tuple[str, str, str], str] = {
    ("Hello", "protocol", "uint32"): "a version",
    ("Hello", "client", "string"): "the name its user chose with --id; at most 100 characters (Roster)",
    ("Hello", "shard_characters", "uint64"): "how much text there is, for the client's share of a window",
    ("Hello", "vocabulary_hash", "string"): "a hash of the tokenizer, only when the user names one",
    ("Hello", "shape_hash", "string"): "a hash of the model's shape, only when the user names one",
    ("Hello", "cut", "string"): "the cut its user insists on",
    ("Hello", "saved_windows", "repeated uint32"): "numbers of windows it has saved",
    ("Hello", "run", "string"): "which run it saved them in; the server drew the name",
    ("Hello", "task", "string"): "a name from a closed list (check_hello)",
    ("Hello", "inspect", "bool"): "that it only asks what the run would have it send",
    ("Hello", "token", "string"): "the secret that its launcher drew for it",
    ("ClientMessage", "begun", "Begun"): "an answer to Begin",
    ("ClientMessage", "manifest", "Manifest"): "sizes of a window",
    ("ClientMessage", "activations", "Activations"): "the cut itself",
    ("ClientMessage", "gradient", "Gradient"): "the way back",
    ("ClientMessage", "update", "UpdateChunk"): "what federated averaging exchanges",
    ("ClientMessage", "saved", "Saved"): "an answer to Save",
    ("ClientMessage", "leave", "Leave"): "that it goes",
    ("ClientMessage", "trained", "Trained"): "cut whole: the loss of a part of its window",
    ("ClientMessage", "delivery", "Delivery"): "on every message of a stream",
    ("Delivery", "sequence", "uint64"): "a count of messages",
    ("Delivery", "received", "uint64"): "a count of messages",
    ("Delivery", "shared_start", "uint64"): "where the message lies that would stand here",
    ("Delivery", "shared_bytes", "uint64"): "how long it is",
    ("Attach", "client", "string"): "its name again",
    ("Attach", "session", "string"): "the secret the server drew for it",
    ("Attach", "token", "string"): "the secret that its launcher drew for it",
    ("Attach", "received", "uint64"): "a count of messages",
    ("Attach", "shared", "Shared"): "only when the server's address is the client's own machine",
    ("Shared", "process", "uint32"): "the number of the client's process",
    ("Shared", "descriptor", "uint32"): "the number of a file of that process",
    ("Shared", "name", "string"): "drawn at random",
    ("Begun", "attempt", "uint32"): "the server's own count, back",
    ("Manifest", "cursor", "Cursor"): "how far it is in its text, so that it can go on without a state of its own",
    ("Manifest", "window", "uint32"): "a count",
    ("Manifest", "lengths", "repeated uint32"): "tokens of each sequence: sizes, which packing needs",
    ("Manifest", "masked", "repeated uint32"): "masked tokens of each sequence: sizes, which the loss needs",
    ("Activations", "window", "uint32"): "a count",
    ("Activations", "micro_batch", "uint32"): "a count",
    ("Activations", "values", "TensorFrame"): "vectors of the cut; what can be read from them is measured by the audit",
    ("Activations", "row_index", "bytes"): "cut rows: which tokens share a row, numbered by first appearance",
    ("Activations", "masked_positions", "bytes"): "where hidden states are wanted, not what was there",
    ("Gradient", "window", "uint32"): "a count",
    ("Gradient", "micro_batch", "uint32"): "a count",
    ("Gradient", "hidden", "TensorFrame"): "d(loss)/d(hidden), of masked positions only",
    ("Gradient", "loss_sum", "double"): "one number for a whole piece",
    ("Trained", "window", "uint32"): "a count",
    ("Trained", "loss_sum", "double"): "one number for a whole part",
    ("Trained", "masked_tokens", "uint64"): "a count",
    ("Trained", "last", "bool"): "the end of its window",
    ("Activations", "held_out_lengths", "repeated uint32"): "sizes of held-out sequences, as a manifest's",
    ("ClientMessage", "evaluated", "Evaluated"): "below",
    ("Evaluated", "window", "uint32"): "a count",
    ("Evaluated", "loss_sum", "double"): "one number for a whole part of the held-out text",
    ("Evaluated", "masked_tokens", "uint64"): "a count",
    ("Evaluated", "last", "bool"): "the end of its evaluation",
    ("Evaluated", "counts", "repeated double"): "sums over a whole part of the held-out examples (held_out_inbox)",
    ("TensorFrame", "codec", "string"): "a name from a closed list (decode)",
    ("TensorFrame", "shape", "repeated uint32"): "must be the announced one (decode)",
    ("TensorFrame", "payload", "bytes"): "the values, of the announced size (decode)",
    ("TensorFrame", "compressed", "bool"): "how to read them",
    ("TensorFrame", "scales", "bytes"): "one number a row, or a group of its columns, of the announced size (decode)",
    ("UpdateChunk", "window", "uint32"): "a count",
    ("UpdateChunk", "name", "string"): "must be a name of the half's tensors (UpdateAssembler)",
    ("UpdateChunk", "shape", "repeated uint32"): "must be that tensor's shape (UpdateAssembler)",
    ("UpdateChunk", "offset", "uint64"): "bytes so far",
    ("UpdateChunk", "payload", "bytes"): "weights, or sums of gradients over a window",
    ("UpdateChunk", "last", "bool"): "the end of a transfer",
    ("UpdateChunk", "compressed", "bool"): "how to read it",
    ("UpdateChunk", "rows", "bytes"): "which rows are not zero, as the rows themselves would tell",
    ("Saved", "window", "uint32"): "a count",
    ("Saved", "peak_memory_bytes", "uint64"): "of the process",
    ("Saved", "flops_per_token", "double"): "of the half, from its shape",
    ("Cursor", "epoch", "uint64"): "a count",
    ("Cursor", "position", "uint64"): "a count of sequences",
    ("Cursor", "sequences", "uint64"): "how many sequences its text has: a size",
}

SCALARS = {
    value: name.removeprefix("TYPE_").lower()
    for name, value in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def fields_of(*roots: Descriptor) -> set[tuple[str, str, str]]:
    """(message, field, type) of everything reachable from these messages."""
    found: set[tuple[str, str, str]] = set()
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        message = waiting.pop()
        if message.full_name in seen:
            continue
        seen.add(message.full_name)
        assert not message.is_extendable, f"{message.name} could hold fields from elsewhere"
        for field in message.fields:
            kind = field.message_type.name if field.message_type else SCALARS[field.type]
            found.add((message.name, field.name, f"{'repeated ' if field.is_repeated else ''}{kind}"))
            if field.message_type:
                waiting.append(field.message_type)
    return found


def requests() -> list[Descriptor]:
    """What clients send, over all calls of the service, and in the metadata of a stream."""
    return [method.input_type for method in pb.DESCRIPTOR.services_by_name["Federation"].methods] + [
        pb.Attach.DESCRIPTOR
    ]


def test_calls_are_the_ones_looked_at() -> None:
    assert {message.name for message in requests()} == {"Hello", "ClientMessage", "Attach"}


def test_every_field_a_client_can_send_has_a_reason() -> None:
    found = fields_of(*requests())
    assert sorted(found - ALLOWED.keys()) == [], "say in ALLOWED why this may leave a client"
    assert sorted(ALLOWED.keys() - found) == [], "these are gone; take them from ALLOWED"
    assert all(ALLOWED.values())


RANK_MAY_SAY: dict[tuple[str, str, str], str] = {
    ("OpenRun", "protocol", "uint32"): "a version",
    ("OpenRun", "secret", "string"): "that both parties share",
    ("OpenRun", "ranks", "uint32"): "a count",
    ("OpenRun", "agreement", "string"): "keys of the run file that both have",
    ("OpenRun", "shape_hash", "string"): "of the model's shape",
    ("OpenRun", "vocabulary", "uint32"): "a count of words",
    ("OpenRun", "pad_token", "uint32"): "the number of the padding",
    ("OpenRun", "resume", "bool"): "what the server's user asked for",
    ("Order", "admit", "Admit"): "who may open a stream",
    ("Order", "begin", "BeginClient"): "that a client begins",
    ("Order", "undo", "Undo"): "that windows have not happened",
    ("Order", "expect", "Expect"): "who takes part in a window",
    ("Order", "drop", "Drop"): "who does not any more",
    ("Order", "commit", "Commit"): "that the body steps",
    ("Order", "save", "Save"): "that the reference is to be written",
    ("Order", "conclude", "Conclude"): "that the result is to be written",
    ("Order", "finish", "Finish"): "that the run is over",
    ("Order", "leave", "Leave"): "that it goes",
    ("Order", "delivery", "Delivery"): "on every message of a stream",
    ("Admit", "window", "uint32"): "a count",
    ("Admit", "clients", "repeated Admission"): "names and sessions",
    ("Admission", "client", "string"): "a name",
    ("Admission", "session", "string"): "a secret of the client's and the aggregator's",
    ("BeginClient", "client", "string"): "a name",
    ("BeginClient", "reference", "bool"): "what the client begins with",
    ("BeginClient", "attempt", "uint32"): "a count",
    ("Undo", "window", "uint32"): "a count",
    ("Undo", "attempt", "uint32"): "a count",
    ("Expect", "window", "uint32"): "a count",
    ("Expect", "average", "bool"): "how updates combine",
    ("Expect", "clients", "repeated string"): "names",
    ("Expect", "masked", "repeated uint64"): "counts, the weights of updates",
    ("Drop", "client", "string"): "a name",
    ("Drop", "gone", "bool"): "whether it comes back",
    ("Commit", "window", "uint32"): "a count",
    ("Commit", "scale", "double"): "one number a window, which clipping needs",
    ("Save", "window", "uint32"): "a count",
    ("Conclude", "window", "uint32"): "a count",
    ("Conclude", "complete", "bool"): "whether the run goes on later",
    ("Conclude", "clients", "repeated string"): "names",
    ("Conclude", "masked", "repeated uint64"): "counts, the weights of halves",
    ("Finish", "reason", "string"): "a sentence for the user",
    ("Finish", "complete", "bool"): "the same",
}
"""What the server's ranks can say to an aggregator of another party: no activation, no manifest, no
tensor.
"""


def test_every_field_a_rank_can_send_to_an_aggregator_has_a_reason() -> None:
    service = pb.DESCRIPTOR.services_by_name["Aggregation"]
    of_streams = {row for row in ALLOWED if row[0] == "Delivery"}
    found = fields_of(*(method.input_type for method in service.methods)) - of_streams
    assert sorted(found - RANK_MAY_SAY.keys()) == [] and sorted(RANK_MAY_SAY.keys() - found) == []


def test_no_bytes_pass_between_ranks_and_an_aggregator() -> None:
    """So no tensor does, in either direction."""
    service = pb.DESCRIPTOR.services_by_name["Aggregation"]
    both = fields_of(*(d for method in service.methods for d in (method.input_type, method.output_type)))
    assert [row for row in both if row[2].endswith("bytes") and row[1] != "shared_bytes"] == []
    assert {row for row in both if row[2].endswith(("double", "float"))} == {
        ("Commit", "scale", "double"),
        ("Combined", "norm", "double"),
        ("Combined", "times", "repeated double"),
    }


def test_the_walk_sees_nested_messages() -> None:
    """A guard of this test itself."""
    assert ("TensorFrame", "payload", "bytes") in fields_of(pb.ClientMessage.DESCRIPTOR)
    assert ("Piece", "num_sequences", "uint32") in fields_of(pb.ServerMessage.DESCRIPTOR)
