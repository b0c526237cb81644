"""Tools in the prompts of chats: by the chat template if it writes calls as `yoco_u/inference/tool_calls.py` says, or by us.

Many templates know no tools, and others write calls in forms of their own. For those, tools become part of the system message,
calls part of what the assistant said, and results what the user says, all in the form of Hermes.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from yoco_u.errors import UserError
from yoco_u.inference.chat_template import chat_text
from yoco_u.inference.tool_calls import CLOSE, OPEN, call_text

_INSTRUCTIONS = """\
You can call tools. Each line between <tools> and </tools> describes one, with its parameters as a JSON schema:
<tools>
{tools}
</tools>

To call tools, end your answer with a block like this for each call, with the tool's name and its arguments as a JSON object:
{call}

The results then come between <tool_response> and </tool_response>."""

_PROBE: dict[str, Any] = {
    "name": "look_up", "description": "Finds the meaning of a word.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
}  # fmt: skip
_PROBE_CALL = {"name": "look_up", "arguments": {"word": "loop"}}


def template_writes_calls(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the chat template shows tools, and writes calls of them in the form of Hermes: it is tried."""
    call = {"id": "call00000", "type": "function", "function": _PROBE_CALL}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00000", "name": "look_up", "content": "!"},
    ]
    try:
        text = chat_text(tokenizer, messages, tools=[{"type": "function", "function": _PROBE}])
    except UserError:
        return False
    calls = re.findall(f"{OPEN}(.*?){CLOSE}", text, re.DOTALL)
    expected = json.dumps(_PROBE_CALL, separators=(",", ":"))
    return _PROBE["description"] in text and any("".join(one.split()) == expected for one in calls)


def written_out(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which tools, calls and results are text.

    Args:
        messages: mappings of `role` and `content`, with the arguments of calls as they were written.
        tools: those that the model may call.

    Raises:
        RecursionError: if a schema is nested too deeply.
    """
    found: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role in ("tool", "function"):
            result = f"<tool_response>\n{content}\n</tool_response>"
            if number and messages[number - 1]["role"] == role:  # results of one answer's calls are one message
                found[-1] = {"role": "user", "content": f"{found[-1]['content']}\n{result}"}
            else:
                found.append({"role": "user", "content": result})
        else:
            calls = [call_text(**call["function"]) for call in message.get("tool_calls", [])]
            others = {key: value for key, value in message.items() if key != "tool_calls"}
            found.append(others | {"content": "\n".join([content] * bool(content) + calls)})
    if not tools:
        return found
    instructions = _INSTRUCTIONS.format(
        tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools),
        call=call_text("NAME", "ARGUMENTS"),
    )
    if found[0]["role"] == "system":
        found[0] |= {"content": f"{found[0]['content']}\n\n{instructions}".lstrip()}
        return found
    return [{"role": "system", "content": instructions}, *found]
