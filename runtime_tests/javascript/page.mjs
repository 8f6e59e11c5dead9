// The page: takes requests from the waiting command, has them answered, posts the replies, and shows how far it is.
// ONNX Runtime computes in a Web Worker (ort_worker.mjs) so that the page stays alive; wllama has one of its own.

import { decode, encode } from './frames.mjs';
import { WllamaDecoder } from './wllama_decoder.mjs';
import { Worker as Requests } from './worker.mjs';

const base = new URL('..', import.meta.url);
const page = Math.random().toString(36).slice(2) + Date.now().toString(36);
const what = document.getElementById('what');
const bar = document.getElementById('bar');
const detail = document.getElementById('detail');
const RETRY_MS = [500, 1000, 2000, 5000];
const sessions = new Map(); // number → Requests or RemoteRequests

/** Shows progress; fraction null: unknown. */
function report(fraction, text) {
  if (fraction === null) bar.removeAttribute('value');
  else bar.value = fraction;
  if (text) what.textContent = text;
}

/** The same face as Requests, behind a Web Worker. */
class RemoteRequests {
  constructor() {
    this.worker = new window.Worker(new URL('ort_worker.mjs', import.meta.url), { type: 'module' });
    this.worker.onmessage = ({ data }) => (data.progress ? report(...data.progress) : this.settle(data));
    this.worker.onerror = (event) => this.settle({ failure: event.message || 'the worker of the page failed' });
  }
  settle({ reply, failure }) {
    const { resolve, reject } = this.waiting;
    if (failure) reject(new Error(failure));
    else resolve(reply);
  }
  answer(header, arrays) {
    return new Promise((resolve, reject) => {
      this.waiting = { resolve, reject };
      this.worker.postMessage([header, arrays]);
    });
  }
  close() {
    this.worker.terminate();
  }
}

function sessionOf({ session, op, runtime }) {
  if (!sessions.has(session) && (op === 'open' || op === 'dequantize_node'))
    sessions.set(session, runtime === 'wllama' ? new Requests({ wllama: WllamaDecoder.open }, null, () => null, report) : new RemoteRequests());
  return sessions.get(session);
}

async function answer({ header, arrays }) {
  if (header.op === 'close') {
    sessions.get(header.session)?.close?.();
    sessions.delete(header.session);
    return [{}, {}];
  }
  if (header.op === 'done') {
    document.body.className = 'done';
    report(1, 'Done. You can close this page; the verdict is on the computer.');
    detail.textContent = '';
    return [{}, {}];
  }
  if (header.label) detail.textContent = header.label;
  if (header.op === 'run') report(header.progress ?? null, 'Computing…');
  const session = sessionOf(header);
  return session ? session.answer(header, arrays) : [{ error: 'no artifact is open' }, {}];
}

/** fetch that is repeated until the computer answers: a phone's network comes and goes. */
async function patiently(address, options) {
  for (let attempt = 0; ; attempt++) {
    try {
      const response = await fetch(new URL(address, base), options);
      if (response.status === 403 || response.status === 404) throw Object.assign(new Error(await response.text()), { final: true });
      if (response.ok) return response;
    } catch (error) {
      if (error.final) throw error;
    }
    if (attempt > 60) throw Object.assign(new Error('the computer does not answer any more'), { final: true });
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(attempt, RETRY_MS.length - 1)]));
  }
}

async function serve() {
  let after = 0;
  for (;;) {
    const response = await patiently(`next?page=${page}&after=${after}`);
    if (response.status === 204) continue;
    const frame = decode(new Uint8Array(await response.arrayBuffer()));
    let reply;
    try {
      reply = encode(...(await answer(frame)));
    } catch (error) {
      reply = encode({ failure: `${error?.name ?? 'Error'}: ${error?.message ?? error}`.slice(0, 600) });
    }
    after = frame.header.n;
    if (!bar.hasAttribute('value')) bar.value = 0; // an indeterminate bar is drawn sixty times a second while nothing runs
    await patiently(`reply?page=${page}&n=${after}`, { method: 'POST', body: reply });
    if (frame.header.op === 'done') return;
  }
}

async function keepScreenOn() {
  try {
    await navigator.wakeLock?.request('screen');
  } catch {
    // not allowed here (no secure context); the page says to keep the screen on
  }
}

keepScreenOn();
document.addEventListener('visibilitychange', () => document.visibilityState === 'visible' && keepScreenOn());
serve().catch((error) => {
  document.body.className = 'failed';
  what.textContent = error.message;
});
