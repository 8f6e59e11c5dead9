// The Web Worker in which onnxruntime-web computes: requests in, replies out, progress in between.

import { download } from './download.mjs';
import { OnnxDecoder } from './onnx_decoder.mjs';
import { Worker as Requests } from './worker.mjs';

const packages = new URL('../packages/onnxruntime-web/dist/', import.meta.url);
const report = (fraction, text) => postMessage({ progress: [fraction, text] });

async function ort() {
  const module = await import(new URL('ort.wasm.min.mjs', packages));
  module.env.wasm.numThreads = 1;
  module.env.wasm.wasmPaths = packages.href;
  return module;
}

async function open(folder, options) {
  const base = new URL(`../${folder}`, import.meta.url);
  return OnnxDecoder.open(await ort(), options, (name) => download(base, name, report));
}

const requests = new Requests({ 'onnxruntime-web': open }, ort, () => null, report);

onmessage = async ({ data: [header, arrays] }) => {
  try {
    postMessage({ reply: await requests.answer(header, arrays) });
  } catch (error) {
    postMessage({ failure: `${error?.name ?? 'Error'}: ${error?.message ?? error}` });
  }
};
