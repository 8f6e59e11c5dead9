// The worker in Node: `node node_worker.mjs RUNTIME=PACKAGE_FOLDER…` answers requests on stdin and stdout.
// Whatever libraries print goes to stderr, so that nothing comes between our frames.

import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { writeSync } from 'node:fs';

import { decode, encode } from './frames.mjs';
import { OnnxDecoder } from './onnx_decoder.mjs';
import { Refusal, Worker } from './worker.mjs';

for (const name of ['log', 'info', 'debug', 'warn']) console[name] = console.error;

const packages = new Map(process.argv.slice(2).map((argument) => [argument.split('=')[0], argument.slice(argument.indexOf('=') + 1)]));

async function ort(runtime) {
  const folder = packages.get(runtime);
  if (!folder) throw new Refusal(`${runtime} is not set up here`);
  if (runtime === 'onnxruntime-node') return createRequire(path.join(folder, 'package.json'))(folder);
  const module = await import(pathToFileURL(path.join(folder, 'dist', 'ort.wasm.min.mjs')));
  module.env.wasm.numThreads = 1;
  return module;
}

const engines = {
  'onnxruntime-web': async (folder, options) => OnnxDecoder.open(await ort('onnxruntime-web'), 'onnxruntime-web', options, (name) => readBytes(folder, name)),
  'onnxruntime-node': async (folder, options) => OnnxDecoder.openFile(await ort('onnxruntime-node'), options, path.join(folder, options.model)),
};

async function readBytes(folder, name) {
  try {
    return new Uint8Array(await readFile(path.join(folder, name)));
  } catch (error) {
    throw new Refusal(`${path.join(folder, name)} cannot be read (${error.code}); export it again`);
  }
}

const worker = new Worker(engines, ort, () => process.resourceUsage().maxRSS * 1024);

function write(bytes) {
  let offset = 0;
  while (offset < bytes.length) {
    try {
      offset += writeSync(1, bytes, offset);
    } catch (error) {
      if (error.code !== 'EAGAIN') throw error;
    }
  }
}

let received = new Uint8Array(0);
for await (const chunk of process.stdin) {
  const joined = new Uint8Array(received.length + chunk.length);
  joined.set(received);
  joined.set(chunk, received.length);
  received = joined;
  for (let frame = decode(received); frame; frame = decode(received)) {
    received = received.slice(frame.size);
    write(encode(...(await worker.answer(frame.header, frame.arrays))));
  }
}
process.exit(0);
