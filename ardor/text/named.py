"""Chat templates by name: the formats that the main families were trained on.

A format is a fact, told by its model's card; the jinja is ours. None guesses: what a format has no
place for (a system message, tools) is refused, or goes where the model's makers put it.
"""

from typing import NamedTuple


class Named(NamedTuple):
    """A template and the control tokens that it needs, as texts."""

    source: str
    control: tuple[str, ...] = ()


_IM = ("<|im_start|>", "<|im_end|>")

_NO_TOOLS = """\
{%- if tools %}
    {{- raise_exception('this chat template has no place for tools') }}
{%- endif %}
{%- for message in messages if message.tool_calls %}
    {{- raise_exception('this chat template has no place for tool calls') }}
{%- endfor %}
"""

# A system message first, or None, and what comes after it.
_SYSTEM = """\
{%- set system, turns = none, messages %}
{%- if messages and messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- endif %}
"""

_ALTERNATE = """\
{%- for message in turns %}
    {%- if message.role != ['user', 'assistant'][loop.index0 % 2] %}
        {{- raise_exception('after an optional system message, roles must be user, assistant, '
            ~ 'user and so on; message ' ~ loop.index ~ ' of these is from ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
"""

CHATML = (
    _NO_TOOLS
    + """\
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
)

LLAMA2 = (
    _NO_TOOLS
    + _SYSTEM
    + _ALTERNATE
    + """\
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- set asked = message.content %}
        {%- if loop.first and system is not none %}
            {%- set asked = '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ asked %}
        {%- endif %}
        {{- bos_token }}{{- '[INST] ' ~ asked.strip() ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ message.content.strip() ~ ' ' ~ eos_token }}
    {%- endif %}
{%- endfor %}"""
)

_HEADERS = """\
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim }}{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

LLAMA3 = _NO_TOOLS + "{{- bos_token }}\n{%- for message in messages %}\n" + _HEADERS

# With a system turn in any case, which tells the date; calls are JSON, and results come from
# "ipython". Source: the model card and prompt format of Llama 3.1.
LLAMA31 = (
    _SYSTEM
    + """\
{{- bos_token }}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}
    {{- 'Environment: ipython\\n' }}
{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' }}
{{- date_string if date_string is defined else strftime_now('%d %b %Y') }}
{{- '\\n\\n' ~ (system or '') | trim ~ '<|eot_id|>' }}
{%- set told = namespace(tools=not tools) %}
{%- for message in turns %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('this format has one tool call in a message') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function or message.tool_calls[0] %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' ~ call.name ~ '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
        {%- continue %}
    {%- endif %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}
    {%- if role == 'user' and not told.tools %}
        {%- set told.tools = true %}
        {{- 'Given the following functions, please respond with a JSON for a function call ' }}
        {{- 'with its proper arguments that best answers the given prompt.\\n\\nRespond in the ' }}
        {{- 'format ' }}
        {{- '{"name": function name, "parameters": dictionary of argument name and its value}.' }}
        {{- 'Do not use variables.\\n\\n' }}
        {%- for tool in tools %}
            {{- tool | tojson(indent=4) }}{{- '\\n\\n' }}
        {%- endfor %}
    {%- endif %}
    {{- message.content | trim }}{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
)

GEMMA = (
    _NO_TOOLS
    + _SYSTEM
    + _ALTERNATE
    + """\
{{- bos_token }}
{%- for message in turns %}
    {{- '<start_of_turn>' ~ ('model' if message.role == 'assistant' else 'user') ~ '\\n' }}
    {%- if loop.first and system is not none %}
        {{- system ~ '\\n\\n' }}
    {%- endif %}
    {{- message.content | trim }}{{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}"""
)

MISTRAL_V1 = (
    _NO_TOOLS
    + _SYSTEM
    + _ALTERNATE
    + """\
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- set first = loop.first and system is not none %}
        {{- ' [INST] ' ~ (system ~ '\\n\\n' if first else '') ~ message.content ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ message.content ~ eos_token }}
    {%- endif %}
{%- endfor %}"""
)


def _mistral(space: str) -> str:
    """The third version of Mistral's format: control tokens, tools, and a space after them or
    none. The system message and the tools stand before the last question."""
    return (
        _SYSTEM
        + """\
{%- set asked = namespace(last=-1) %}
{%- for message in turns if message.role == 'user' %}
    {%- set asked.last = loop.index0 %}
{%- endfor %}
{%- set questions = namespace(seen=-1) %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- set questions.seen = questions.seen + 1 %}
        {%- set last = questions.seen == asked.last %}
        {%- if last and tools %}
            {{- '[AVAILABLE_TOOLS]SPACE' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- set before = system ~ '\\n\\n' if last and system is not none else '' %}
        {{- '[INST]SPACE' ~ before ~ message.content ~ '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS]SPACE[' }}
        {%- for call in message.tool_calls %}
            {%- set made = call.function or call %}
            {%- if not call.id %}
                {{- raise_exception('a tool call needs an id in this format') }}
            {%- endif %}
            {{- '{"name": ' ~ (made.name | tojson) ~ ', "arguments": ' }}
            {{- (made.arguments | tojson) ~ ', "id": ' ~ (call.id | tojson) ~ '}' }}
            {{- '' if loop.last else ', ' }}
        {%- endfor %}
        {{- ']' ~ eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- 'SPACE' ~ message.content ~ eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]SPACE{"content": ' ~ (message.content | tojson) ~ ', "call_id": ' }}
        {{- (message.tool_call_id | default('') | tojson) ~ '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('only user, assistant and tool may follow, not ' ~ message.role) }}
    {%- endif %}
{%- endfor %}""".replace("SPACE", space)
    )


MISTRAL_V7 = (
    _NO_TOOLS
    + """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST]' ~ message.content ~ '[/INST]' }}
    {%- elif message.role == 'system' %}
        {{- '[SYSTEM_PROMPT]' ~ message.content ~ '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content ~ eos_token }}
    {%- else %}
        {{- raise_exception('only system, user and assistant may speak, not ' ~ message.role) }}
    {%- endif %}
{%- endfor %}"""
)

PHI3 = (
    _NO_TOOLS
    + """\
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('only system, user and assistant may speak, not ' ~ message.role) }}
    {%- endif %}
    {{- '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}"""
)

PHI4 = (
    _NO_TOOLS
    + """\
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '<|im_sep|>' ~ message.content ~ '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant<|im_sep|>' }}
{%- endif %}"""
)

ZEPHYR = (
    _NO_TOOLS
    + """\
{%- for message in messages %}
    {{- '<|' ~ message.role ~ '|>\\n' ~ message.content ~ eos_token ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}"""
)

VICUNA = (
    _NO_TOOLS
    + _SYSTEM
    + _ALTERNATE
    + """\
{%- if system is none %}
    {%- set system = 'A chat between a curious user and an artificial intelligence assistant. '
        ~ "The assistant gives helpful, detailed, and polite answers to the user's questions." %}
{%- endif %}
{{- bos_token }}{{- system ~ ' ' }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- 'USER: ' ~ message.content ~ ' ASSISTANT:' }}
    {%- else %}
        {{- ' ' ~ message.content ~ eos_token }}
    {%- endif %}
{%- endfor %}"""
)

ALPACA = (
    _NO_TOOLS
    + _SYSTEM
    + _ALTERNATE
    + """\
{%- if system is none %}
    {%- set system = 'Below is an instruction that describes a task. '
        ~ 'Write a response that appropriately completes the request.' %}
{%- endif %}
{{- bos_token }}{{- system ~ '\\n\\n' }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '### Instruction:\\n' ~ message.content ~ '\\n\\n### Response:\\n' }}
    {%- else %}
        {{- message.content ~ eos_token ~ '\\n\\n' }}
    {%- endif %}
{%- endfor %}"""
)

COMMAND_R = (
    _NO_TOOLS
    + """\
{{- bos_token }}
{%- set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} %}
{%- for message in messages %}
    {%- if message.role not in names %}
        {{- raise_exception('only system, user and assistant may speak, not ' ~ message.role) }}
    {%- endif %}
    {{- '<|START_OF_TURN_TOKEN|><|' ~ names[message.role] ~ '_TOKEN|>' }}
    {{- message.content.strip() ~ '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}
{%- endif %}"""
)

# ChatML with tools, as Hermes writes them: signatures between <tools> tags in the system message,
# calls and results between tags of their own.
_QWEN_SYSTEM = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if system is not none %}
        {{- system ~ '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' ~ (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and ' }}
    {{- 'arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": ' }}
    {{- '<function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif system is not none %}
    {{- '<|im_start|>system\\n' ~ system ~ '<|im_end|>\\n' }}
{%- endif %}
"""

_QWEN_TOOL = """\
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""

_QWEN_CALL = """\
{%- macro calls(message, begun) %}
    {%- for call in message.tool_calls %}
        {%- set made = call.function or call %}
        {{- '\\n' if begun or not loop.first else '' }}
        {{- '<tool_call>\\n{"name": "' ~ made.name ~ '", "arguments": ' }}
        {{- made.arguments | tojson }}{{- '}\\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
"""

QWEN25 = (
    _QWEN_CALL
    + _SYSTEM
    + """\
{%- if system is none %}
    {%- set system = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}
{%- endif %}
"""
    + _QWEN_SYSTEM
    + """\
{%- for message in turns %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}{{- '\\n' ~ message.content if message.content else '' }}
        {{- calls(message, true) }}{{- '<|im_end|>\\n' }}
"""
    + _QWEN_TOOL
    + """\
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
)

# Thoughts stay only after the last question; without them an empty one is written there.
QWEN3 = (
    _QWEN_CALL
    + _SYSTEM
    + _QWEN_SYSTEM
    + """\
{%- set asked = namespace(last=-1) %}
{%- for message in turns %}
    {%- if message.role == 'user' and not (message.content.startswith('<tool_response>')
            and message.content.endswith('</tool_response>')) %}
        {%- set asked.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- set thought = message.reasoning_content or '' %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > asked.last and (loop.last or thought) %}
            {{- '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' }}
            {%- set content = content.lstrip('\\n') %}
        {%- endif %}
        {{- content }}{{- calls(message, content) }}{{- '<|im_end|>\\n' }}
"""
    + _QWEN_TOOL
    + """\
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
)


def _deepseek(answer: str, opening: str) -> str:
    return (
        _NO_TOOLS
        + _SYSTEM
        + """\
{{- bos_token }}{{- system or '' }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' ~ message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<｜Assistant｜>' ~ ANSWER ~ '<｜end▁of▁sentence｜>' }}
    {%- else %}
        {{- raise_exception('only user and assistant may follow, not ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>OPENING' }}
{%- endif %}""".replace("ANSWER", answer).replace("OPENING", opening)
    )


GRANITE = (
    _NO_TOOLS
    + """\
{%- for message in messages %}
    {{- '<|start_of_role|>' ~ message.role ~ '<|end_of_role|>' ~ message.content }}
    {{- '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_of_role|>assistant<|end_of_role|>' }}
{%- endif %}"""
)

OLMO2 = (
    _NO_TOOLS
    + """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>\\n' ~ message.content ~ eos_token }}{{- '' if loop.last else '\\n' }}
    {%- else %}
        {{- '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}"""
)

_MISTRAL = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]")
_MISTRAL += ("[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_TURNS = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")

NAMED: dict[str, Named] = {
    "chatml": Named(CHATML, _IM),
    "llama2": Named(LLAMA2),
    "llama3": Named(LLAMA3, _HEADER),
    "llama3.1": Named(LLAMA31, _HEADER),
    "gemma": Named(GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "mistral-v1": Named(MISTRAL_V1),
    "mistral-v3": Named(_mistral(" "), _MISTRAL),
    "mistral-v3-tekken": Named(_mistral(""), _MISTRAL),
    "mistral-v7-tekken": Named(
        MISTRAL_V7, ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    ),
    "phi3": Named(PHI3, ("<|user|>", "<|assistant|>", "<|end|>")),
    "phi4": Named(PHI4, (*_IM, "<|im_sep|>")),
    "zephyr": Named(ZEPHYR),
    "vicuna": Named(VICUNA),
    "alpaca": Named(ALPACA),
    "command-r": Named(COMMAND_R, _TURNS),
    "qwen2.5": Named(QWEN25, _IM),
    "qwen3": Named(QWEN3, _IM),
    "deepseek-v3": Named(_deepseek("message.content", ""), _DEEPSEEK),
    "deepseek-r1": Named(
        _deepseek("message.content.split('</think>')[-1]", "<think>\\n"), _DEEPSEEK
    ),
    "granite": Named(GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")),
    "olmo2": Named(OLMO2),
}
