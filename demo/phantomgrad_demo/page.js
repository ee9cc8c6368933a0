// What the whole page's buttons and its search do; Gradio runs it once. Everything is delegated, as tabs come and go.

async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const field = document.body.appendChild(Object.assign(document.createElement('textarea'), { value: text }));
  field.select();
  document.execCommand('copy'); // what remains on a page without https
  field.remove();
}

// A copy of the drawing that looks the same without the page's style sheet.
function standalone(svg) {
  const made = svg.cloneNode(true), originals = [svg, ...svg.querySelectorAll('*')];
  [made, ...made.querySelectorAll('*')].forEach((copied, index) => {
    const style = getComputedStyle(originals[index]);
    for (const name of ['fill', 'stroke', 'stroke-width', 'stroke-dasharray', 'font-size', 'font-family', 'text-anchor'])
      copied.style.setProperty(name, style.getPropertyValue(name));
  });
  made.setAttribute('xmlns', 'http://www.w3.org/2000/svg');
  made.style.background = getComputedStyle(document.body).backgroundColor;
  made.style.color = getComputedStyle(svg).color;
  return made;
}

// The maps as one drawing: an SVG with one image for each canvas.
function drawingOf(canvases) {
  const size = 160, gap = 10, across = canvases.length / 2;
  const names = { xmlns: 'http://www.w3.org/2000/svg', viewBox: `0 0 ${across * (size + gap)} ${2 * (size + gap)}` };
  const svg = document.createElementNS(names.xmlns, 'svg');
  for (const [name, value] of Object.entries(names)) svg.setAttribute(name, value);
  canvases.forEach((canvas, index) => {
    const image = svg.appendChild(document.createElementNS(names.xmlns, 'image'));
    const place = { x: (index % across) * (size + gap), y: Math.floor(index / across) * (size + gap), width: size, height: size };
    const look = { href: canvas.toDataURL(), style: 'image-rendering: pixelated' };
    for (const [name, value] of Object.entries({ ...place, ...look })) image.setAttribute(name, value);
    image.appendChild(document.createElementNS(names.xmlns, 'title')).textContent = canvas.getAttribute('aria-label');
  });
  return svg;
}

function save(button) {
  const figure = button.closest('figure'), canvases = [...figure.querySelectorAll('canvas')];
  const drawing = canvases.length ? drawingOf(canvases) : standalone(figure.querySelector('svg[role=img]'));
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
