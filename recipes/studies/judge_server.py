"""
A judge behind HTTP that has bad days: it fails, hangs and answers nonsense. Standard library only.

    python recipes/studies/judge_server.py --fail 0.2 --hang 0.02 --garbage 0.05

prints its port. `POST /` with a text gives `{"score": …}`, the number of its letters over 10; `GET /counts` says what
it did so far. What happens to the n-th request depends on the seed alone.
"""

import argparse
import asyncio
import json
import random
from collections import Counter

NONSENSE = ['{"score": "great!"}', '{"score": null', '{"score": NaN}', "<html>", '{"score": [1, 2]}', "\x00\xff", ""]


def score(text: str) -> float:
    return sum(character.isalpha() for character in text) / 10


class Judge:
    """The server: what it did, and the generator of its moods."""

    def __init__(self, fail: float, hang: float, garbage: float, seed: int):
        self.moods = {"failed": fail, "hung": hang, "garbage": garbage, "scored": 1.0 - fail - hang - garbage}
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while header := await reader.readuntil(b"\r\n\r\n"):
                method, *_ = header.split(b" ", 1)
                fields = dict(line.lower().split(b": ", 1) for line in header.split(b"\r\n")[1:] if b": " in line)
                text = (await reader.readexactly(int(fields.get(b"content-length", 0)))).decode()
                status, body = (200, json.dumps(self.counts)) if method == b"GET" else await self.judge(text)
                payload = body.encode("latin-1")
                writer.write(f"HTTP/1.1 {status} -\r\ncontent-length: {len(payload)}\r\n\r\n".encode() + payload)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()

    async def judge(self, text: str) -> tuple[int, str]:
        (mood,) = self.rng.choices(list(self.moods), list(self.moods.values()))
        self.counts[mood] += 1
        if mood == "hung":
            await asyncio.sleep(3600)
        if mood == "failed":
            return 500, "out of memory"
        return 200, self.rng.choice(NONSENSE) if mood == "garbage" else json.dumps({"score": score(text)})


async def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"fail": 0.2, "hang": 0.02, "garbage": 0.05}.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--seed", type=int, default=0)
    server = await asyncio.start_server(Judge(**vars(parser.parse_args())).handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
