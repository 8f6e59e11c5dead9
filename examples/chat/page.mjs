// What a person sees: loads the model, sends what is typed, shows the answer as it comes.

const $ = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
// A module with one SIMD instruction; ONNX Runtime and llama.cpp cannot do without.
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];

let model = null;
let messages = []; // {role, content} of this chat
let stopped = false;

async function start() {
  if (!globalThis.WebAssembly?.validate(new Uint8Array(SIMD)))
    throw new Error('This browser has no WebAssembly SIMD, which the model needs. Use Chrome 91, Firefox 89, Safari 16.4 or newer.');
  const { openModel } = await import('./model.mjs');
  model = await openModel(showLoading);
  $('facts').textContent = `${megabytes(model.bytes)} · ${model.engine.where}`;
  $('bar').hidden = true;
  $('text').placeholder = model.chats ? 'Message' : 'Once upon a time…';
  $('hint').textContent = model.chats ? 'Ask something' : 'Begin a text';
  const continues = 'This model has no chat template: it continues the text that you give it. ';
  $('detail').textContent = `${model.chats ? '' : continues}The model runs in this browser, and what you type stays on this device.`;
  $('text').disabled = false;
  enableSend();
}

function showLoading({ name, total, received }) {
  $('name').textContent = document.title = name;
  $('facts').textContent = megabytes(total);
  if (received < total) {
    $('hint').textContent = `Loading ${name}…`;
    $('bar').value = received / total;
    $('detail').textContent = `${megabytes(received)} of ${megabytes(total)}`;
  } else {
    $('hint').textContent = 'Preparing the model…';
    $('bar').removeAttribute('value');
    $('detail').textContent = '';
  }
}

async function answer(text) {
  $('intro').hidden = $('error').hidden = true;
  const block = element('div', 'answer');
  const paragraph = element('p');
  const shown = element('span');
  const figures = element('small');
  if (model.chats) $('log').append(element('p', 'mine', text));
  else paragraph.append(element('b', '', text));
  paragraph.append(shown);
  block.append(paragraph, figures);
  block.setAttribute('aria-busy', 'true');
  $('log').append(block);
  follow(true);

  stopped = false;
  answering(true);
  messages.push({ role: 'user', content: text });
  let last = { text: '', tokens: 0 };
  try {
    let first = null;
    for await (const part of model.answer(messages)) {
      last = part;
      if (stopped) break;
      if (part.tokens === 0) continue; // still reading the prompt
      first ??= performance.now();
      const speed = (1000 * (part.tokens - 1)) / (performance.now() - first);
      shown.textContent = part.text;
      figures.textContent = part.tokens > 1 ? `${part.tokens} tokens · ${speed.toFixed(1)} tokens/s` : '1 token';
      follow();
    }
    if (stopped || last.note) figures.textContent += ` · ${stopped ? 'stopped' : last.note}`;
    messages.push({ role: 'assistant', content: last.text });
  } catch (error) {
    messages.pop();
    fail(error);
  }
  block.setAttribute('aria-busy', 'false');
  answering(false);
  follow();
}

function answering(is) {
  document.body.classList.toggle('answering', is);
  $('send').setAttribute('aria-label', is ? 'Stop' : 'Send');
  $('new').hidden = false;
  $('new').disabled = is;
  enableSend();
}

function enableSend() {
  $('send').disabled = !model || (!document.body.classList.contains('answering') && !$('text').value.trim());
}

function element(tag, className = '', text = '') {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

/** Keeps the end in view, unless the person has scrolled away from it. */
function follow(anyway = false) {
  const { scrollHeight, scrollTop, clientHeight } = $('scroll');
  if (anyway || scrollHeight - scrollTop - clientHeight < 120) $('scroll').scrollTop = scrollHeight;
}

function fail(error) {
  console.error(error);
  $('intro').hidden = true;
  $('error').hidden = false;
  $('error').textContent = sentence(String(error?.message ?? error));
  follow(true);
}

function sentence(message) {
  if (/out of memory|bad_alloc|allocation failed|\bOOM\b|access out of bounds|could not allocate/i.test(message))
    return 'The memory that this browser gives a page does not suffice for this model. Close other pages, or take a smaller model or fewer bits.';
  if (/failed to fetch|load failed|networkerror|imported module/i.test(message))
    return 'The server does not answer. Look whether serve.py still runs, then load this page again.';
  return message.split('\n')[0].slice(0, 400);
}

$('composer').addEventListener('submit', (event) => {
  event.preventDefault();
  const text = $('text').value.trim();
  if (document.body.classList.contains('answering')) stopped = true;
  else if (model && text) {
    $('text').value = '';
    answer(text);
  }
});
$('text').addEventListener('input', enableSend);
$('text').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!document.body.classList.contains('answering')) $('composer').requestSubmit();
});
$('new').addEventListener('click', () => {
  messages = [];
  $('log').replaceChildren();
  $('new').hidden = $('error').hidden = true;
  $('intro').hidden = false;
  $('text').focus();
});
start().catch(fail);
