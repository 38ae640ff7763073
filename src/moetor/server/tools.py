"""Tools as Hermes and Qwen models call them.

The chat template tells the model of the tools; what it writes between `<tool_call>` and
`</tool_call>`, a JSON object with a name and arguments, becomes a call.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from moetor.server.errors import refusal
from moetor.server.protocol import ChatBody

BEGIN, END = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools of a request.

    Attributes:
        tools: of which the template is to tell.
        callable: those of them that may be called.
        forced: whether one must be.
        single: whether there may be one call alone.
    """

    tools: list[dict[str, Any]]
    callable: list[dict[str, Any]]
    forced: bool
    single: bool

    @property
    def constrained(self) -> bool:
        """Whether what the model writes of a call has to be held to a form."""
        return self.forced or any(tool["function"].get("strict") for tool in self.callable)


def offered_tools(body: ChatBody, template: Any) -> Offer | None:
    """The tools of a request; None where there are none to tell of.

    Args:
        template: the chat template's text.

    Raises:
        ApiError: status 400: a tool is malformed, or its kind of use is not possible here.
    """
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none"):
            raise refusal("tool_choice needs tools", "tool_choice")
        if body.parallel_tool_calls is not None:
            raise refusal("parallel_tool_calls needs tools", "parallel_tool_calls")
        return None
    for index, tool in enumerate(body.tools):
        _check_tool(index, tool)
    named = _named_tools(body.tools, choice)
    if choice == "none":
        return None
    if not isinstance(template, str) or "tools" not in template or BEGIN not in template:
        raise refusal(
            f"the chat template of this model has no tools that are called with {BEGIN}; start the "
            "server with --chat-template FILE, or leave tools out",
            "tools",
        )
    return Offer(
        tools=body.tools,
        callable=named or body.tools,
        forced=choice not in (None, "auto"),
        single=body.parallel_tool_calls is False or bool(named),
    )


def _named_tools(
    tools: list[dict[str, Any]], choice: str | dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The tool that `choice` names, alone; none where it names none.

    Raises:
        ApiError: status 400: it is malformed, or there is no such tool.
    """
    if choice is None or choice in ("none", "auto", "required"):
        return []
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(choice, dict) or choice.get("type") != "function" or name is None:
        raise refusal(
            "tool_choice can be 'none', 'auto', 'required', or "
            '{"type": "function", "function": {"name": NAME}}',
            "tool_choice",
        )
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        raise refusal(f"tool_choice names {str(name)[:64]!r}, which is not in tools", "tool_choice")
    return found


def _check_tool(index: int, tool: dict[str, Any]) -> None:
    function = tool.get("function")
    function = function if isinstance(function, dict) else {}
    name = function.get("name")
    if tool.get("type") != "function" or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise refusal(
            f"tools.{index} must be of type function, with a name of at most 64 letters, digits, "
            "dots, dashes and underscores",
            "tools",
        )
    parameters, strict = function.get("parameters"), function.get("strict")
    if not isinstance(parameters, dict | None) or not isinstance(strict, bool | None):
        raise refusal(
            f"tools.{index}: parameters must be a JSON schema, and strict true or false", "tools"
        )


def with_parsed_arguments(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of an earlier answer, with their arguments as templates want them: not as text.

    Raises:
        ApiError: status 400: they are not JSON objects.
    """
    made = []
    for call in calls:
        function = dict(call.get("function") or {})
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function["arguments"] = json.loads(arguments or "{}")
            except ValueError as error:
                raise refusal(
                    "the arguments of a tool call must be a JSON object as text", "messages"
                ) from error
        made.append({**call, "function": function})
    return made


@dataclass(slots=True)
class ToolParser:
    """Parts a text, piece by piece, into what is said and what is called.

    Attributes:
        single: keep the first call alone.
        count: calls so far.
    """

    single: bool = False
    count: int = 0
    _held: str = ""
    _inside: bool = field(default=False)

    def feed(self, piece: str, *, final: bool) -> tuple[str, list[dict[str, Any]]]:
        """Takes in a piece.

        Args:
            final: whether it is the last one.

        Returns:
            The text that is certain to be none of a call, and the calls that are complete.
        """
        self._held += piece
        said = ""
        calls: list[dict[str, Any]] = []
        while True:
            mark = END if self._inside else BEGIN
            place = self._held.find(mark)
            if place < 0:
                break
            before, self._held = self._held[:place], self._held[place + len(mark) :]
            if self._inside:
                said += self._close(before, calls, END)
            else:
                said += before.rstrip()  # the line break before a call
            self._inside = not self._inside
        if final:
            rest, self._held = self._held, ""
            if self._inside:  # the text ended inside a call
                self._inside = False
                return said + self._close(rest, calls, ""), calls
            return said + (rest.strip() if self.count else rest), calls
        if not self._inside:
            keep = self._kept()
            said += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        return said, calls

    def _kept(self) -> int:
        """Characters at the end that may belong to a mark: its beginning, and spaces before it."""
        part = next(n for n in range(len(BEGIN) - 1, -1, -1) if self._held.endswith(BEGIN[:n]))
        shown = self._held[: len(self._held) - part]
        return len(self._held) - len(shown.rstrip())

    def _close(self, inside: str, calls: list[dict[str, Any]], end: str) -> str:
        """Adds the call; text that is none is said as it was written."""
        try:
            read = json.loads(inside)
        except (ValueError, RecursionError):
            read = None
        name = read.get("name") if isinstance(read, dict) else None
        if not isinstance(name, str):
            return BEGIN + inside + end
        if self.single and self.count:
            return ""
        arguments = read.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append(
            {
                "index": self.count,
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": name, "arguments": text},
            }
        )
        self.count += 1
        return ""
