// One exported folder in @huggingface/transformers in Node, for `onnx_forms`: what onnx_forms_process.py says of others.
// node this.mjs PACKAGE ROOT FOLDER PROMPT COUNT DECODED
import { pathToFileURL } from 'node:url';

const [folderOfPackage, root, folder, prompt, count, decoded] = process.argv.slice(2);
const library = await import(pathToFileURL(`${folderOfPackage}/dist/transformers.node.mjs`).href);
library.env.allowRemoteModels = false;
library.env.localModelPath = root;
const ids = prompt.split(',');
const model = await library.AutoModelForCausalLM.from_pretrained(folder, {
  session_options: { intraOpNumThreads: 1, interOpNumThreads: 1 },
});

async function generate(tokens, options) {
  const input_ids = new library.Tensor('int64', BigInt64Array.from(ids, BigInt), [1, ids.length]);
  const attention_mask = new library.Tensor('int64', new BigInt64Array(ids.length).fill(1n), [1, ids.length]);
  const began = [process.cpuUsage(), performance.now()];
  const made = await model.generate({ input_ids, attention_mask, max_new_tokens: tokens, do_sample: false, ...options });
  const { user, system } = process.cpuUsage(began[0]);
  return { tokens: made.tolist()[0].slice(ids.length).map(Number), cpu: (user + system) / 1e6, wall: (performance.now() - began[1]) / 1e3 };
}

const tokens = Number(count) ? (await generate(Number(count), {})).tokens : [];
const first = await generate(1, { min_new_tokens: 1 });
const all = await generate(Number(decoded), { min_new_tokens: Number(decoded) });
const more = Number(decoded) - 1;
console.log(JSON.stringify({ tokens, tokens_per_cpu_s: more / (all.cpu - first.cpu), tokens_per_s: more / (all.wall - first.wall) }));
