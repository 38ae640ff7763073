"""Pictures in messages: what the server says is what the engine says with the same picture."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2 as httpx
import pytest
from aiohttp import web
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from engine.engine_cases import make_model
from moetor import LLM, AsyncEngine, SamplingParams
from moetor.engine import EngineConfig
from moetor.huggingface import loading
from moetor.server import ServerConfig, create_app
from moetor.server.errors import ApiError
from moetor.server.images import ImageLoader, is_public

CHAT = "/v1/chat/completions"
MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONFIG = EngineConfig(max_num_seqs=4, kv_cache_blocks=64, max_model_len=200)


class Processor(Qwen3VLProcessor):
    """Of pictures alone: the one of videos needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **more: Any) -> None:
        super().__init__(image_processor, tokenizer, **more)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def make_processor() -> Processor:
    base = loading.load_tokenizer("demo")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base.backend_tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    pixels = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=1024
    )
    return Processor(image_processor=pixels, tokenizer=tokenizer)


def make_eyes(processor: Processor) -> Any:
    """A tiny model whose marks are the tokenizer's."""
    from moetor.tools.tiny import tiny_model

    ids = dict(zip(MARKS, processor.tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    settings = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": {"vocab_size": len(processor.tokenizer) + 8},
    }
    return tiny_model("qwen3_vl_moe", seed=3, settings=settings)


def picture(seed: int, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> tuple[Any, bytes]:
    data = bytes((seed * 31 + 7 * place * place) % 256 for place in range(size[0] * size[1] * 3))
    image = Image.frombytes("RGB", size, data)
    held = io.BytesIO()
    image.save(held, kind)
    return image, held.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def message(*urls: str, text: str = "What is this?") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def serve(engine: AsyncEngine, work: Callable[[httpx.AsyncClient, Any], Awaitable[None]]) -> None:
    app = create_app(engine, ServerConfig(), "tiny")

    async def run() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            await work(http, app)
        await engine.shutdown()

    asyncio.run(asyncio.wait_for(run(), 100))


def test_pictures_reach_the_model() -> None:
    processor = make_processor()
    model = make_eyes(processor)
    parts: dict[str, Any] = {"tokenizer": processor.tokenizer, "processor": processor}
    llm = LLM(model, level="none", max_num_seqs=4, kv_cache_blocks=64, max_model_len=200, **parts)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    pictures = [picture(seed, size) for seed, size in ((1, (24, 16)), (2, (24, 16)), (3, (9, 40)))]

    def own(*images: Any) -> list[int]:
        content = [{"type": "image", "image": one} for one in images]
        said = [{"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]}]
        (output,) = llm.chat(said, params)
        assert output.error is None
        return output.outputs[0].token_ids

    wanted = [own(image) for image, _ in pictures]
    assert wanted[0] != wanted[1], "the picture does not matter"
    both = own(pictures[0][0], pictures[2][0])
    engine = AsyncEngine.from_model(model, config=CONFIG, level="none", **parts)

    async def work(http: httpx.AsyncClient, _: Any) -> None:
        asked = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": True}

        async def ask(*urls: str, stream: bool = False) -> str:
            body = {**asked, "messages": message(*urls), "stream": stream, "logprobs": not stream}
            answer = await http.post(CHAT, json=body)
            assert answer.status_code == 200, answer.text
            return answer.text if stream else answer.json()["choices"][0]["message"]["content"]

        urls = [data_url(data) for _, data in pictures]
        texts = await asyncio.gather(*(ask(url) for url in urls), ask(urls[0], urls[2]))
        told = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]
        assert texts == [*told, processor.tokenizer.decode(both, skip_special_tokens=True)]
        assert (await ask(urls[0], stream=True)).endswith("data: [DONE]\n\n")
        plain = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        assert (await http.post(CHAT, json=plain)).status_code == 200
        for wrong, told_ in WRONG:
            answer = await http.post(CHAT, json={"messages": [{"role": "user", "content": wrong}]})
            assert answer.status_code == 400, answer.text
            assert told_ in answer.json()["error"]["message"]
        many = await http.post(CHAT, json={"messages": message(*urls[:1] * 33)})
        assert many.status_code == 400
        assert "at most 32" in many.text

    serve(engine, work)


def url_part(url: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url, **more}}]


WRONG: list[tuple[list[dict[str, Any]], str]] = [
    (url_part("data:image/png;base64,AA=="), "no picture"),
    (url_part("data:image/png;base64,%%%"), "base64"),
    (url_part("data:image/png,AAAA"), "base64"),
    (url_part(data_url(b"GIF89a")), "no picture"),
    (url_part("file:///etc/passwd"), "data:"),
    (url_part("ftp://example.org/x.png"), "data:"),
    (url_part("https://example.org/x.png"), "--allow-image-host"),
    (url_part("http://127.0.0.1/x.png"), "--allow-image-host"),
    (url_part("http://[::1"), "URL"),
    (url_part(7), "url"),
    (url_part(data_url(picture(1)[1]), detail="high"), "detail"),
    (url_part(data_url(picture(1)[1]), size=3), "no others"),
    ([{"type": "input_audio", "input_audio": {}}], "input_audio"),
]


def test_a_model_of_text_refuses_pictures(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={"messages": message(data_url(picture(1)[1]))})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert "takes text alone" in answer.json()["error"]["message"]
    tiny = LLM(make_model("qwen3_moe", 3), level="none", kv_cache_blocks=64)
    with pytest.raises(ValueError, match="text alone"):
        tiny.chat([{"role": "user", "content": [{"type": "image", "image": picture(1)[0]}]}])


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_fetching() -> None:
    image, data = picture(5, (8, 8))
    asked: list[str] = []

    async def give(request: web.Request) -> web.StreamResponse:
        asked.append(request.host)
        match request.path:
            case "/large":
                return web.Response(body=b"x" * (17 * 2**20))
            case "/moved":
                raise web.HTTPFound("/good")
            case "/text":
                return web.Response(text="no picture")
        return web.Response(body=data)

    async def work() -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", give)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        resolved: list[str] = []

        async def resolve(host: str, _: int) -> list[str]:
            resolved.append(host)
            return ["127.0.0.1"] if len(resolved) else []

        host = f"pictures.example:{port}"
        loader = ImageLoader([host], resolve=resolve, allowed=lambda _: True)
        (found,) = await loader.load([f"http://{host}/good"])
        assert found.tobytes() == image.tobytes()
        assert resolved == ["pictures.example"], "the name was looked up once"
        assert asked == [host]
        for path, told in (("moved", "redirects"), ("large", "16 MiB"), ("text", "no picture")):
            with pytest.raises(ApiError, match=told):
                await loader.load([f"http://{host}/{path}"])
        with pytest.raises(ApiError, match="--allow-image-host"):
            await loader.load([f"http://other.example:{port}/good"])
        with pytest.raises(ApiError, match="password"):
            await loader.load([f"http://user:pass@{host}/good"])
        before = len(asked)
        guarded = ImageLoader([host, f"127.0.0.1:{port}"], resolve=resolve)
        for where in (host, f"127.0.0.1:{port}"):
            with pytest.raises(ApiError, match="not public"):
                await guarded.load([f"http://{where}/good"])
        assert len(asked) == before, "nothing was connected to"
        await runner.cleanup()

    asyncio.run(asyncio.wait_for(work(), 60))
