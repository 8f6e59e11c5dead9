// Generates greedily with @huggingface/transformers from a folder on this disk: node this.mjs PACKAGE ROOT FOLDER PROMPT COUNT
import { pathToFileURL } from 'node:url';

const [folderOfPackage, root, folder, prompt, count] = process.argv.slice(2);
const { pipeline, env } = await import(pathToFileURL(`${folderOfPackage}/dist/transformers.node.mjs`).href);
env.allowRemoteModels = false;
env.localModelPath = root;
const generate = await pipeline('text-generation', folder);
const [{ generated_text: text }] = await generate(prompt, { max_new_tokens: Number(count), do_sample: false });
console.log(JSON.stringify(text));
