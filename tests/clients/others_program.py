"""Asks by LangChain and LiteLLM. Arguments: the base URL, the model's name. Prints JSON."""

import json
import sys

import litellm
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
ASKED = "What is the capital of France?"


class Person(BaseModel):
    """What an answer must be."""

    name: str
    age: int


place = {"base_url": f"{URL}/v1", "api_key": "none", "model": MODEL}
chat, found = ChatOpenAI(**place, temperature=0, max_tokens=30), {}
found["invoke"] = chat.invoke(ASKED).content
found["stream"] = "".join(part.content for part in chat.stream(ASKED))
structured = chat.with_structured_output(Person, method="json_schema")
found["parsed"] = structured.invoke("Tell me of a person.").model_dump()
vectors = OpenAIEmbeddings(**place, check_embedding_ctx_length=False)
found["embedding"] = vectors.embed_query("A boat")
light = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0}
messages = [{"role": "user", "content": ASKED}]
found["litellm"] = litellm.completion(**light, messages=messages).choices[0].message.content
parts = litellm.completion(**light, messages=messages, stream=True)
found["litellm stream"] = "".join(part.choices[0].delta.content or "" for part in parts)
print(json.dumps(found))
