// A web app that shows a picture in the making: node examples/sse.mjs PHOTO STYLE [SERVER] [PORT]
import { once } from 'node:events';
import { createServer } from 'node:http';
import { NstClient } from '@nst/client';

const [content, style, server = 'localhost:50051', port = '8080'] = process.argv.slice(2);
const client = new NstClient(server);
const readers = new Map(); // How many pages watch each job.
const graceMs = 5_000;

const page = `<!doctype html><title>Style transfer</title><img id="picture"><p id="state"></p>
<script>
  const events = new EventSource('/events');
  const listen = (name, show) => events.addEventListener(name, (event) => show(JSON.parse(event.data)));
  listen('progress', ({ iteration, iterations }) => (state.textContent = iteration + ' of ' + iterations));
  listen('picture', ({ url }) => (picture.src = url));
  listen('end', (outcome) => (events.close(), (state.textContent = outcome)));
</script>`;

async function stream(request, response) {
  const gone = new AbortController();
  const { signal } = gone;
  response.on('close', () => gone.abort());
  response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' });
  // A browser that lost its connection comes back with the id of the last message that it saw.
  let [job, afterSequence] = request.headers['last-event-id']?.split(' ') ?? [];
  let outcome = 'done';
  try {
    job ??= (await client.createJob({ content, styles: [style] })).name;
    readers.set(job, (readers.get(job) ?? 0) + 1);
    const send = async (name, data, { sequence }) => {
      const message = `id: ${job} ${sequence}\nevent: ${name}\ndata: ${JSON.stringify(data)}\n\n`;
      const room = response.write(message);
      if (!room) await once(response, 'drain', { signal }); // A slow reader gets fewer frames, not a longer queue.
    };
    for await (const event of client.watchJob(job, { afterSequence: Number(afterSequence ?? 0), signal })) {
      if (event.kind === 'progress') {
        await send('progress', { iteration: event.iteration, iterations: event.iterations }, event);
      } else if (event.kind === 'frame' || event.kind === 'result') {
        const { format, data } = event.image;
        await send('picture', { url: `data:image/${format};base64,${data.toString('base64')}` }, event);
      }
    }
  } catch (error) {
    outcome = error.message;
  }
  response.end(`event: end\ndata: ${JSON.stringify(outcome)}\n\n`);
  readers.set(job, readers.get(job) - 1);
  setTimeout(() => readers.get(job) || client.cancelJob(job).catch(() => {}), graceMs); // Nobody came back.
}

const web = createServer((request, response) => {
  if (request.url === '/events') return stream(request, response);
  response.writeHead(200, { 'content-type': 'text/html; charset=utf-8' }).end(page);
});
web.listen(Number(port), '127.0.0.1', () => console.log(`http://127.0.0.1:${web.address().port}`));
