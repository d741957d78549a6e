"""The Jinja chat template that gives other programs the tokens of `k2lab.text.chat.render`.

It takes OpenAI-style messages (`chat.to_openai`), `tools`, `add_generation_prompt`, and two switches that may be passed as
template variables: `thinking` and `default_system`, as in `render`. One difference cannot be removed: programs that tokenise the
template's *text* turn special-token strings inside messages into special tokens; `render` never does.
"""

from __future__ import annotations

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."

# Tags strip the white space around them, so line ends and indentation below are not part of the rendered text.
_TEMPLATE = """\
{#- Kimi K2 chat format. Variables: messages, tools, add_generation_prompt, thinking, default_system. -#}
{%- set thinking = thinking if thinking is defined and thinking is not none else @THINKING@ -%}
{%- set default_system = default_system if default_system is defined and default_system is not none else @DEFAULT_SYSTEM@ -%}
{%- set ns = namespace(think=thinking, final=-1, calls=0, ids={}) -%}

{#- Thoughts are kept only behind the last finished answer; the message that ends the text is never history. -#}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {%- if message.get('reasoning_content') -%}{%- set ns.think = true -%}{%- endif -%}
    {%- if not message.get('tool_calls') and (add_generation_prompt or not loop.last) -%}
      {%- set ns.final = loop.index0 -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}

{%- macro content(message) -%}
  {%- set value = message.get('content') -%}
  {%- if value is string -%}
    {{- value -}}
  {%- elif value is not none and value is defined -%}
    {%- for part in value -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}

{%- if tools -%}
  {{- '<|im_system|>tool_declare<|im_middle|>' + tools | tojson(separators=(',', ':')) + '<|im_end|>' -}}
{%- endif -%}
{%- if default_system and messages and messages[0].role != 'system' -%}
  {{- '<|im_system|>system<|im_middle|>@SYSTEM_TEXT@<|im_end|>' -}}
{%- endif -%}

{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '<|im_user|>' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<|im_assistant|>' -}}
  {%- elif message.role == 'system' or message.role == 'tool' -%}
    {{- '<|im_system|>' -}}
  {%- else -%}
    {{- raise_exception('unknown role: ' + message.role) -}}
  {%- endif -%}
  {{- (message.get('name') or message.role) + '<|im_middle|>' -}}
  {%- if message.role == 'tool' -%}
    {{- '## Return of ' + ns.ids.get(message.tool_call_id, message.tool_call_id) + '\\n' -}}
  {%- endif -%}
  {%- if message.role == 'assistant' and ns.think -%}
    {{- '<think>' -}}
    {%- if loop.index0 > ns.final and message.get('reasoning_content') -%}{{- message.reasoning_content -}}{%- endif -%}
    {{- '</think>' -}}
  {%- endif -%}
  {{- content(message) -}}
  {%- if message.get('tool_calls') -%}
    {{- '<|tool_calls_section_begin|>' -}}
    {%- for call in message.tool_calls -%}
      {%- set id = 'functions.' + call.function.name + ':' + ns.calls | string -%}
      {%- set ns.calls = ns.calls + 1 -%}
      {%- if call.get('id') -%}{%- set ns.ids = dict(ns.ids, **{call.id: id}) -%}{%- endif -%}
      {{- '<|tool_call_begin|>' + id + '<|tool_call_argument_begin|>' -}}
      {%- if call.function.arguments is string -%}
        {{- call.function.arguments -}}
      {%- else -%}
        {{- call.function.arguments | tojson -}}
      {%- endif -%}
      {{- '<|tool_call_end|>' -}}
    {%- endfor -%}
    {{- '<|tool_calls_section_end|>' -}}
  {%- endif -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}

{%- if add_generation_prompt -%}
  {{- '<|im_assistant|>assistant<|im_middle|>' -}}
{%- endif -%}
"""


def chat_template(default_system: bool = True, thinking: bool = False) -> str:
    """The template's text; the arguments are the values that its two switches have when the caller passes none."""
    return (
        _TEMPLATE.replace("@THINKING@", str(thinking).lower())
        .replace("@DEFAULT_SYSTEM@", str(default_system).lower())
        .replace("@SYSTEM_TEXT@", DEFAULT_SYSTEM)
    )
