"""The naive trainer: split learning as public demos do it.

One client at a time sends padded fp32 activations of one batch, pickled over HTTP, and waits; the
server runs plain transformers layers, answers with all hidden states, takes the gradient back in
another request and steps after every batch. Each request opens a connection, as `requests.post`
does; `--keep-connection` is kinder. Kind to both: sequences are padded to the longest of their
batch only.

    python -m benchmarks.naive.trainer serve --config FILE --tokenizer FOLDER
    python -m benchmarks.naive.trainer train --config FILE --tokenizer FOLDER --shards FOLDER
        --server HOST:PORT

`serve` prints its address and ends with its input; `train` prints one line of JSON. Pickle is part
of what is measured: serve listens on the loopback, or on a link that the benchmark has made, and to
nobody else.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import pickle
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedbert_ds.bench.process import address_of
from fedbert_ds.config import RunConfig
from fedbert_ds.run_file import load_config


class PaddedBody:
    """The layers of a BERT with AdamW, on padded batches [B, S, H]."""

    def __init__(self, model: Any, learning_rate: float) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._encoder: nn.Module = model.bert.encoder.to(self._device).train()
        self._optimizer = torch.optim.AdamW(self._encoder.parameters(), lr=learning_rate)
        self._activations: Tensor | None = None
        self._hidden: Tensor | None = None
        self.busy_seconds = 0.0

    def forward(self, activations: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, S, H] of activations [B, S, H]; mask [B, S] is 0 for padding."""
        started = time.monotonic()
        self._activations = activations.to(self._device).requires_grad_()
        bias = (1.0 - mask.to(self._device)[:, None, None, :]) * torch.finfo(torch.float32).min
        self._hidden = self._encoder(self._activations, attention_mask=bias).last_hidden_state
        hidden = self._hidden.detach().cpu()
        self.busy_seconds += time.monotonic() - started
        return hidden

    def backward(self, gradient: Tensor) -> Tensor:
        """Step on d(loss)/d(hidden) [B, S, H]; returns d(loss)/d(activations)."""
        started = time.monotonic()
        assert self._hidden is not None and self._activations is not None
        self._hidden.backward(gradient.to(self._device))
        self._optimizer.step()
        self._optimizer.zero_grad()
        assert self._activations.grad is not None
        input_gradient = self._activations.grad.cpu()
        self.busy_seconds += time.monotonic() - started
        return input_gradient


def start_server(body: PaddedBody, host: str) -> ThreadingHTTPServer:
    """A server in a thread that answers POST /forward and /backward with pickled arrays."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = pickle.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/forward":
                answer: Any = body.forward(torch.from_numpy(request[0]), torch.from_numpy(request[1])).numpy()
            elif self.path == "/backward":
                answer = body.backward(torch.from_numpy(request)).numpy()
            else:
                answer = body.busy_seconds
            payload = pickle.dumps(answer)
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Client:
    """One client's end: embeddings and head with their own AdamW, and a way to the server."""

    def __init__(self, model: Any, address: str, learning_rate: float, keep_connection: bool = False) -> None:
        self._embeddings, self._head = model.bert.embeddings.train(), model.cls.train()
        parameters = {*self._embeddings.parameters(), *self._head.parameters()}
        self._optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
        self._keep_connection = keep_connection
        self._connection = _connection(address)
        self.bytes_up = self.bytes_down = 0

    def train(self, sequences: list[Tensor], labels: Tensor) -> float:
        """Train on a batch of token ids [length] each; `labels` [B, S] or -100. Its loss."""
        input_ids = pad_sequence(sequences, batch_first=True)
        mask = pad_sequence([torch.ones(len(sequence)) for sequence in sequences], batch_first=True)
        activations = self._embeddings(input_ids=input_ids)
        hidden = self._ask("/forward", (activations.detach().numpy(), mask.numpy())).requires_grad_()
        logits = self._head(hidden)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        assert hidden.grad is not None
        activations.backward(self._ask("/backward", hidden.grad.numpy()))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def server_busy_seconds(self) -> float:
        """What the body has computed so far."""
        return float(pickle.loads(self._post("/busy", pickle.dumps(None))))

    def _ask(self, path: str, request: Any) -> Tensor:
        payload = pickle.dumps(request)
        answer = self._post(path, payload)
        self.bytes_up += len(payload)
        self.bytes_down += len(answer)
        return torch.from_numpy(pickle.loads(answer))

    def _post(self, path: str, payload: bytes) -> bytes:
        self._connection.request("POST", path, body=payload)
        answer = self._connection.getresponse().read()
        if not self._keep_connection:
            self._connection.close()  # the next request opens it again
        return answer


def _connection(address: str) -> http.client.HTTPConnection:
    """To the server, through the link if the environment names one, as gRPC does."""
    link = os.environ.get("http_proxy", "").removeprefix("http://")
    connection = http.client.HTTPConnection(link or address)
    if link:
        connection.set_tunnel(address)
    return connection


def train(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    shards: Path,
    address: str,
    seconds: float,
    keep_connection: bool = False,
) -> dict[str, Any]:
    """Let clients take turns for about so long; what it took."""
    import copy

    from fedbert_ds.bench.text import first_batches

    num_clients = len(list(shards.glob("*.jsonl")))
    clients = [Client(copy.deepcopy(model), address, config.optimizer.lr, keep_connection) for _ in range(num_clients)]
    tokens, started, busy = 0, 0.0, 0.0
    turns = 0
    for window in first_batches(config, shards, tokenizer, config.run.windows):
        for client, batch in zip(clients, window.values(), strict=True):
            for sequences, labels in _batches(batch, config.window.tokens_per_micro_batch):
                client.train(sequences, labels)
                turns += 1
                if turns == 1:
                    # The first one pays for what happens once.
                    started, busy, tokens = time.monotonic(), client.server_busy_seconds(), 0
                    for other in clients:
                        other.bytes_up = other.bytes_down = 0
                    continue
                tokens += sum(map(len, sequences))
                if time.monotonic() - started > seconds:
                    break
        if started and time.monotonic() - started > seconds:
            break
    elapsed = time.monotonic() - started
    return {
        "tokens": tokens,
        "seconds": elapsed,
        "busy_seconds": clients[0].server_busy_seconds() - busy,
        "bytes_up": sum(client.bytes_up for client in clients),
        "bytes_down": sum(client.bytes_down for client in clients),
    }


def _batches(batch: Any, tokens: int) -> list[tuple[list[Tensor], Tensor]]:
    """A client's window in batches of at most `tokens` tokens, labels padded like sequences."""
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.masked_positions] = batch.labels
    groups: list[list[int]] = [[]]
    for number, length in enumerate(batch.lengths):
        if groups[-1] and sum(batch.lengths[i] for i in groups[-1]) + length > tokens:
            groups.append([])
        groups[-1].append(number)
    sequences = batch.input_ids.split(batch.lengths)
    targets = labels.split(batch.lengths)
    return [
        ([sequences[i] for i in group], pad_sequence([targets[i] for i in group], True, padding_value=-100))
        for group in groups
    ]


def main() -> None:
    """Either end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("end", choices=["serve", "train"])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--server", help="- to read it from standard input, once it is known")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--keep-connection", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    from fedbert_ds.data.tokenizer import load_tokenizer
    from fedbert_ds.model.checkpoint import build_model

    torch.set_num_threads(1)
    config = load_config(options.config, options.overrides)
    tokenizer = load_tokenizer(options.tokenizer)
    model = build_model(config.model, len(tokenizer), tokenizer.pad_token_id, config.run.seed)
    if options.end == "serve":
        server = start_server(PaddedBody(model, config.optimizer.lr), options.host)
        print(f"{options.host}:{server.server_port}", flush=True)
        sys.stdin.read()
    else:
        wanted = options.shards, address_of(options.server), options.seconds, options.keep_connection
        print(json.dumps(train(config, model, tokenizer, *wanted)))


if __name__ == "__main__":
    main()
