"""Asks by OpenAI's own client. Arguments: the base URL, the model's name. Prints JSON."""

import json
import sys

from openai import NotFoundError, OpenAI
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
ASKED = [{"role": "user", "content": "What is the capital of France?"}]


class Person(BaseModel):
    """What an answer must be."""

    name: str
    age: int


client = OpenAI(base_url=f"{URL}/v1", api_key="none")
chats, found = client.chat.completions, {}
found["models"] = [model.id for model in client.models.list()]
made = chats.create(model=MODEL, messages=ASKED, temperature=0, logprobs=True, top_logprobs=3)
found["chat"] = made.choices[0].message.content
found["usage"] = made.usage.completion_tokens
found["logprobs"] = [
    [one.token, one.logprob, len(one.top_logprobs)] for one in made.choices[0].logprobs.content
]
options = {"include_usage": True}
parts = list(chats.create(model=MODEL, messages=ASKED, temperature=0, stream=True, stream_options=options))
found["stream"] = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
found["stream usage"] = parts[-1].usage.completion_tokens
person = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me of a person."}], "temperature": 0}
found["parsed"] = (
    chats.parse(response_format=Person, max_tokens=200, **person).choices[0].message.parsed.model_dump()
)
with chats.stream(response_format=Person, max_tokens=200, **person) as stream:
    found["parsed stream"] = stream.get_final_completion().choices[0].message.parsed.model_dump()
seeds = chats.create(model=MODEL, messages=ASKED, seed=7, n=3, max_tokens=8, stop=["."])
found["several"] = [choice.message.content for choice in seeds.choices]
vectors = client.embeddings.create(model=MODEL, input=["A boat", "Butter"]).data  # as base64
found["embeddings"] = [one.embedding for one in vectors]
text = client.completions.create(
    model=MODEL, prompt="The sea is", max_tokens=5, temperature=0, echo=True, logprobs=2
)
found["text"] = text.choices[0].text
answer = client.responses.create(model=MODEL, input=ASKED[0]["content"], temperature=0)
found["response"] = [answer.output_text, answer.status]
with client.responses.stream(model=MODEL, input=ASKED, temperature=0) as stream:
    found["response stream"] = stream.get_final_response().output_text
try:
    chats.create(model="gpt", messages=ASKED)
except NotFoundError as error:
    found["error"] = [error.code, error.param]
print(json.dumps(found))
