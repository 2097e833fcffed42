// A web app that shows a picture in the making: node examples/sse.mjs PHOTO STYLE [SERVER] [PORT]
import { once } from 'node:events';
import { createServer } from 'node:http';
import { NstClient } from '@nst/client';

const [content, style, server = 'localhost:50051', port = '8080'] = process.argv.slice(2);
const client = new NstClient(server);

const page = `<!doctype html><title>Style transfer</title><img id="picture"><p id="state"></p>
<script>
  const events = new EventSource('/events');
  const listen = (name, show) => events.addEventListener(name, (event) => show(JSON.parse(event.data)));
  listen('progress', ({ iteration, iterations }) => (state.textContent = iteration + ' of ' + iterations));
  listen('picture', ({ url }) => (picture.src = url));
  listen('end', (outcome) => (events.close(), (state.textContent = outcome)));
</script>`;

const message = (name, data) => `event: ${name}\ndata: ${JSON.stringify(data)}\n\n`;

async function stream(response) {
  const gone = new AbortController();
  const { signal } = gone;
  response.on('close', () => gone.abort()); // The reader has left: cancel the job.
  response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' });
  const send = async (name, data) => {
    const room = response.write(message(name, data));
    if (!room) await once(response, 'drain', { signal }); // A slow reader gets fewer frames, not a longer queue.
  };
  let outcome = 'done';
  try {
    for await (const event of client.stylize({ content, styles: [style] }, { signal })) {
      if (event.kind === 'progress') {
        await send('progress', { iteration: event.iteration, iterations: event.iterations });
      } else if (event.kind === 'frame' || event.kind === 'result') {
        const { format, data } = event.image;
        await send('picture', { url: `data:image/${format};base64,${data.toString('base64')}` });
      }
    }
  } catch (error) {
    outcome = error.message;
  }
  response.end(message('end', outcome));
}

const web = createServer((request, response) => {
  if (request.url === '/events') return stream(response);
  response.writeHead(200, { 'content-type': 'text/html; charset=utf-8' }).end(page);
});
web.listen(Number(port), '127.0.0.1', () => console.log(`http://127.0.0.1:${web.address().port}`));
