// What llama.cpp makes of a GGUF file: called by gguf_in_llama_cpp.py, which compares.
// Standard input: {"file", "context", "texts", "chats", "prompts", "ends", "newTokens"}.
import { readFileSync } from "node:fs";
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

const asked = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath: asked.file });
const context = await model.createContext({ contextSize: asked.context, threads: 1 });
const sequence = context.getSequence();

async function continuation(ids) {
  await sequence.clearHistory();
  const said = [];
  for await (const token of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
    said.push(token);
    if (asked.ends.includes(token) || said.length === asked.newTokens) break;
  }
  return said;
}

const start = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
const answer = {
  texts: asked.texts.map((text) => [...start, ...model.tokenize(text, false)]),
  chats: asked.chats.map((text) => model.tokenize(text, true)),
  continuations: [],
};
for (const ids of asked.prompts) answer.continuations.push(await continuation(ids));
process.stdout.write(JSON.stringify(answer));
process.exit(0);
