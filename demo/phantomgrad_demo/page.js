// What the whole page's buttons and its search do; Gradio runs it once. Everything is delegated, as tabs come and go.

async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const field = document.body.appendChild(Object.assign(document.createElement('textarea'), { value: text }));
  field.select();
  document.execCommand('copy'); // what remains on a page without https
  field.remove();
}

const SVG = 'http://www.w3.org/2000/svg', ROW = 18;
const draw = (parent, tag, attributes, text = '') => {
  const made = parent.appendChild(document.createElementNS(SVG, tag));
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
};

// Title and legend, which the page writes beside the drawing, above it.
function explain(svg, title, legend) {
  const [, , width, height] = svg.getAttribute('viewBox').split(' ').map(Number), above = ROW * (legend.length + 1) + 8;
  const text = { 'font-size': 12, 'font-family': 'sans-serif', fill: 'currentColor', x: 8 };
  svg.setAttribute('viewBox', `0 ${-above} ${width} ${height + above}`);
  draw(svg, 'text', { ...text, 'font-weight': 600, y: ROW - above }, title);
  legend.forEach(([label, line], row) => {
    const y = ROW * (row + 2) - above, { stroke, strokeDasharray } = getComputedStyle(line);
    draw(svg, 'line', { x1: 8, x2: 36, y1: y - 4, y2: y - 4, style: `stroke: ${stroke}; stroke-width: 2.5; stroke-dasharray: ${strokeDasharray}` });
    draw(svg, 'text', { ...text, x: 42, y }, label);
  });
  return svg;
}

// A copy of the drawing that looks the same without the page's style sheet.
function standalone(svg) {
  const made = svg.cloneNode(true), originals = [svg, ...svg.querySelectorAll('*')];
  [made, ...made.querySelectorAll('*')].forEach((copied, index) => {
    const style = getComputedStyle(originals[index]);
    for (const name of ['fill', 'stroke', 'stroke-width', 'stroke-dasharray', 'font-size', 'font-family', 'text-anchor'])
      copied.style.setProperty(name, style.getPropertyValue(name));
  });
  made.style.background = getComputedStyle(document.body).backgroundColor;
  made.style.color = getComputedStyle(svg).color;
  return made;
}

// The maps as one drawing: an SVG with one image for each canvas.
function drawingOf(canvases) {
  const size = 160, gap = 10, below = 24, across = canvases.length / 2;
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('viewBox', `0 0 ${across * (size + gap)} ${2 * (size + below)}`);
  svg.style.background = getComputedStyle(document.body).backgroundColor;
  svg.style.color = getComputedStyle(document.body).color;
  canvases.forEach((canvas, index) => {
    const place = { x: (index % across) * (size + gap), y: Math.floor(index / across) * (size + below), width: size, height: size };
    draw(svg, 'image', { ...place, href: canvas.toDataURL(), style: 'image-rendering: pixelated' });
    const grid = canvas.parentElement.querySelector('span').textContent;
    const words = `${index < across ? 'size' : 'change'}, ${grid}: ${canvas.parentElement.querySelector('small').textContent}`;
    draw(svg, 'text', { x: place.x, y: place.y + size + 14, 'font-size': 10, 'font-family': 'sans-serif', fill: 'currentColor' }, words);
  });
  return svg;
}

function save(button) {
  const figure = button.closest('figure'), canvases = [...figure.querySelectorAll('canvas')];
  const title = figure.querySelector('figcaption').firstChild.textContent, step = document.querySelector('#pg-answer [data-step]')?.dataset.step;
  const legend = [...figure.querySelectorAll('.pg-legend li')].map((item) => [item.textContent, item.querySelector('line')]);
  const drawing = canvases.length
    ? explain(drawingOf(canvases), `${title}, step ${step}`, [])
    : explain(standalone(figure.querySelector('svg[role=img]')), title, legend);
  const file = new Blob([new XMLSerializer().serializeToString(drawing)], { type: 'image/svg+xml' });
  const name = canvases.length ? 'maps' : figure.querySelector('svg[role=img]').dataset.name;
  const anchor = Object.assign(document.createElement('a'), { href: URL.createObjectURL(file), download: `phantomgrad-${name}.svg` });
  anchor.click();
  URL.revokeObjectURL(anchor.href);
}

const texts = {
  link: () => `${window.location.origin}${window.location.pathname}?${document.documentElement.dataset.link}`,
  python: () => document.documentElement.dataset.python,
};

document.addEventListener('click', async (event) => {
  const button = event.target.closest('button');
  if (button?.matches('[data-save]')) save(button);
  if (!button?.matches('[data-copy]')) return;
  const text = texts[button.dataset.copy](), name = (button.dataset.name ??= button.textContent);
  await copy(text);
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = name; }, 1500);
});

document.addEventListener('input', (event) => {
  const list = event.target.matches?.('.pg-classes input') && event.target.closest('.pg-classes');
  if (!list) return;
  const wanted = event.target.value.trim().toLowerCase();
  let shown = 0;
  for (const item of list.querySelectorAll('li')) {
    item.hidden = !item.textContent.toLowerCase().includes(wanted);
    shown += item.hidden ? 0 : 1;
  }
  list.querySelector('output').textContent = `${shown} shown`;
});

// A setting of the first tab is another question; see settle.js. Before Gradio's own listeners.
document.addEventListener('input', (event) => {
  if (event.target.closest?.('.pg-asks')) document.dispatchEvent(new CustomEvent('pg-turn'));
}, true);

// A field that was left empty gets a number from Gradio, which tells nobody.
document.addEventListener('focusout', (event) => {
  if (event.target.matches?.('.pg-controls input[type=number]') && event.target.value === '')
    setTimeout(() => event.target.dispatchEvent(new Event('input', { bubbles: true })), 50);
});

// A photo on the clipboard is pasted wherever the focus is, except into a field.
document.addEventListener('paste', (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith('image/'));
  const input = document.querySelector('#pg-photo input[type=file]');
  if (!files.length || !input || event.target.matches?.('input, textarea') || event.target.closest?.('#pg-photo')) return;
  const given = new DataTransfer();
  given.items.add(files[0]);
  input.files = given.files;
  input.dispatchEvent(new Event('change', { bubbles: true }));
});

// A result belongs to the photo that it was computed for: beside another one a hint stands in its place.
function expire() {
  for (const result of document.querySelectorAll('[data-source]:not(html)'))
    result.hidden = result.dataset.source !== document.documentElement.dataset.source;
}
document.addEventListener('pg-source', expire);

// The buttons of one choice are one group for the arrow keys; Gradio gives each a name of its own.
new MutationObserver(() => {
  expire();
  for (const group of document.querySelectorAll('.pg-controls fieldset'))
    for (const button of group.querySelectorAll(`input[type=radio]:not([name="${group.dataset.group}"])`)) {
      group.dataset.group ??= button.name;
      button.name = group.dataset.group;
    }
}).observe(document.body, { childList: true, subtree: true });
