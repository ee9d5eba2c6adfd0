"""Writes tests/fixtures/chat/cases.json: conversations as transformers renders them, with what the assistant says.

usage: python tests/interop/make_chat_cases.py   (transformers 5 and jinja2; no model, no network)

The templates are written here, each in the style of a family. `learned` is written by hand from the family's rules, not
taken from any program: the text of every assistant turn with the token that ends it.
"""
import datetime, json, pathlib
from transformers.utils import chat_template_utils

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = "" %}
    {%- set rest = messages %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in rest %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role == 'tool' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content | tojson + "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN3 = """\
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.last_query < 0 and message.role == 'user' %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(last_user=0) %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if loop.index0 == ns.last_user and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# One line, refuses systems, renames the assistant.
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)

# Trims on both sides of every tag, puts the system's words before the first user's, asks what kind of content it has.
GEMMA3 = """\
{{ bos_token }}
{%- set prefix = namespace(text='') -%}
{%- set rest = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix.text = (messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text']) + '\\n\\n' -%}
    {%- set rest = messages[1:] -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate user/assistant/user/assistant") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix.text if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {{ '<start_of_image>' if item['type'] == 'image' else item['text'] | trim }}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("neither text nor parts") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""

# Ends a whole conversation with the end of the text.
PHI3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)

GENERATION = """\
{% for message in messages %}
    {% if message.role == 'assistant' %}
<|im_start|>assistant
        {% generation %}
{{ message.content }}<|im_end|>
        {% endgeneration %}
    {% else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Ends nothing but with a line break, shows loop controls, a macro, a filter on a method, Python's own words.
PLAIN = """\
{%- macro name(role) %}{{ {'user': 'Human', 'assistant': 'AI'}.get(role, role.title()) }}{% endmacro %}
{%- for message in messages %}
    {%- if message.role == 'developer' %}{% continue %}{% endif %}
    {%- if loop.index > 7 %}{% break %}{% endif %}
{{ name(message.role) }}: {{ message.content.strip() }}
{% endfor %}
{{- [true, none, 1.5, 3 // 2, 'a' ~ 1] | length }} {{ true }} {{ none }} {{ 1.5 }} {{ {'b': '<é>', 'a': [1, {}]} | tojson }}
{{ {'b': [1, 'x'], 'a': {}} | tojson(indent=2) }}
{{ {'b': 'é', 'a': none} | tojson(sort_keys=true, ensure_ascii=true) }}
{%- if add_generation_prompt %}

AI:{% endif %}
"""


def m(role, content, **others):
    return {"role": role, "content": content, **others}


USER, ANSWER = m("user", "  Grüße, <b>who</b> are you?"), m("assistant", "  A model.\nIndeed. ")
SYSTEM, MORE, END = m("system", "Be brief."), m("user", "[hash: faq] And you?"), m("assistant", "Me too")
LONG = [SYSTEM, USER, ANSWER, MORE, END]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": "ü<"}}}]}
THINK = m("assistant", "<think>\nHm, so.\n</think>\n\nFour")
TOOL = {"type": "function", "function": {"name": "f", "description": "<adds>", "parameters": {"type": "object", "required": ["x"]}}}

CASES = [
    ("chatml", CHATML, [USER, ANSWER], ["  A model.\nIndeed. <|im_end|>"], {}),
    ("chatml", CHATML, LONG, ["  A model.\nIndeed. <|im_end|>", "Me too<|im_end|>"], {}),
    ("chatml", CHATML, [ANSWER, MORE, END, USER], ["  A model.\nIndeed. <|im_end|>", "Me too<|im_end|>"], {}),
    ("chatml", CHATML, [USER, ANSWER, END, MORE, END], ["  A model.\nIndeed. <|im_end|>", "Me too<|im_end|>", "Me too<|im_end|>"], {}),
    ("llama3", LLAMA3, [USER, ANSWER], ["A model.\nIndeed.<|eot_id|>"], {}),
    ("llama3", LLAMA3, LONG, ["A model.\nIndeed.<|eot_id|>", "Me too<|eot_id|>"], {}),
    ("llama3", LLAMA3, [USER, CALL, m("tool", "a \"b\""), END], ['{"name": "f", "parameters": {"x": 1, "y": "ü<"}}<|eot_id|>', "Me too<|eot_id|>"], {}),
    ("qwen3", QWEN3, [USER, END], ["<think>\n\n</think>\n\nMe too<|im_end|>"], {}),
    ("qwen3", QWEN3, LONG, ["  A model.\nIndeed. <|im_end|>", "<think>\n\n</think>\n\nMe too<|im_end|>"], {}),
    ("qwen3", QWEN3, [USER, THINK, MORE, THINK], ["Four<|im_end|>", "<think>\nHm, so.\n</think>\n\nFour<|im_end|>"], {}),
    ("qwen3", QWEN3, [USER, END], ["<think>\n\n</think>\n\nMe too<|im_end|>"], {"tools": [TOOL]}),
    ("mistral", MISTRAL, [USER, ANSWER], [" A model.\nIndeed.</s>"], {}),
    ("mistral", MISTRAL, [USER, ANSWER, MORE, END], [" A model.\nIndeed.</s>", " Me too</s>"], {}),
    ("mistral", MISTRAL, LONG, [" A model.\nIndeed.</s>", " Me too</s>"], {}),
    ("gemma2", GEMMA2, [USER, ANSWER], ["A model.\nIndeed.<end_of_turn>"], {}),
    ("gemma2", GEMMA2, [USER, ANSWER, MORE, END], ["A model.\nIndeed.<end_of_turn>", "Me too<end_of_turn>"], {}),
    ("gemma3", GEMMA3, [USER, ANSWER, MORE, END], ["A model.\nIndeed.<end_of_turn>", "Me too<end_of_turn>"], {}),
    ("gemma3", GEMMA3, LONG, ["A model.\nIndeed.<end_of_turn>", "Me too<end_of_turn>"], {}),
    ("phi3", PHI3, LONG, ["  A model.\nIndeed. <|end|>", "Me too<|end|>"], {}),
    ("phi4", PHI4, [USER, ANSWER], ["  A model.\nIndeed. <|end|>"], {}),
    ("phi4", PHI4, LONG, ["  A model.\nIndeed. <|end|>", "Me too<|end|>"], {}),
    ("generation", GENERATION, LONG, ["  A model.\nIndeed. <|im_end|>\n", "Me too<|im_end|>\n"], {}),
    ("plain", PLAIN, [SYSTEM, m("developer", "x"), USER, ANSWER, MORE], [" A model.\nIndeed."], {}),
]
TURN_ENDS = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>"]


class Noon(datetime.datetime):
    @classmethod
    def now(cls):
        return cls(2026, 1, 31, 12)


chat_template_utils.datetime = Noon
cases = []
for name, source, messages, learned, others in CASES:
    template = chat_template_utils._compile_jinja_template(source)
    render = lambda prompt, messages=messages: template.render(
        messages=messages, tools=others.get("tools"), documents=None, add_generation_prompt=prompt, **TOKENS
    )
    try:
        prompt = render(True)
    except Exception as error:
        prompt = {"raised": str(error)}
    text = render(False)
    place = 0
    for turn in learned:
        place = text.index(turn, place) + len(turn)
    cases.append({"family": name, "messages": messages, **others, "text": text, "prompt": prompt, "learned": learned})
content = {
    "date": "2026-01-31",
    "special_tokens": TOKENS,
    "turn_ends": TURN_ENDS,
    "templates": {name: source for name, source, *_ in CASES},
    "cases": cases,
}
path = pathlib.Path(__file__).parent.parent / "fixtures" / "chat" / "cases.json"
path.parent.mkdir(exist_ok=True)
path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
