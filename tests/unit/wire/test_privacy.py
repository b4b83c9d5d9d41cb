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
    ("ClientMessage", "attach", "Attach"): "first message of a stream",
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
    ("UpdateChunk", "weight", "double"): "a count of tokens",
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
    """What clients send, over all calls of the service."""
    return [method.input_type for method in pb.DESCRIPTOR.services_by_name["Federation"].methods]


def test_calls_are_the_ones_looked_at() -> None:
    assert {message.name for message in requests()} == {"Hello", "ClientMessage"}


def test_every_field_a_client_can_send_has_a_reason() -> None:
    found = fields_of(*requests())
    assert sorted(found - ALLOWED.keys()) == [], "say in ALLOWED why this may leave a client"
    assert sorted(ALLOWED.keys() - found) == [], "these are gone; take them from ALLOWED"
    assert all(ALLOWED.values())


def test_the_walk_sees_nested_messages() -> None:
    """A guard of this test itself."""
    assert ("TensorFrame", "payload", "bytes") in fields_of(pb.ClientMessage.DESCRIPTOR)
    assert ("Piece", "num_sequences", "uint32") in fields_of(pb.ServerMessage.DESCRIPTOR)
