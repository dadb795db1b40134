// dockerode against the daemon at argv[2]: each step throws when an answer is not what docker gives.
'use strict';
const assert = require('node:assert');
const { PassThrough } = require('node:stream');
const Docker = require('dockerode');

const IMAGE = 'lab/busybox';
const FOREVER = ['sh', '-c', 'while true; do sleep 0.1; done'];
const docker = new Docker({ socketPath: process.argv[2] });

function collector() {
  const stream = new PassThrough();
  const chunks = [];
  stream.on('data', chunk => chunks.push(chunk));
  return { stream, text: () => Buffer.concat(chunks).toString() };
}

function ended(stream) {
  return new Promise((resolve, reject) => stream.on('end', resolve).on('close', resolve).on('error', reject));
}

async function main() {
  assert.strictEqual((await docker.ping()).toString(), 'OK');
  assert.strictEqual((await docker.version()).Os, 'linux');
  assert.strictEqual((await docker.info()).OSType, 'linux');

  const out = collector();
  const [told, done] = await docker.run(IMAGE, ['sh', '-c', 'echo ran; exit 4'], [out.stream, process.stderr], { Tty: false });
  assert.strictEqual(told.StatusCode, 4);
  assert.strictEqual(out.text(), 'ran\n');
  await done.remove();

  const container = await docker.createContainer({ Image: IMAGE, Cmd: FOREVER, name: 'rode', Labels: { a: 'b' } });
  await container.start();
  assert.strictEqual((await container.inspect()).State.Running, true);
  const listed = await docker.listContainers({ filters: { label: ['a=b'] } });
  assert.deepStrictEqual(listed.map(each => each.Names[0]), ['/rode']);

  const exec = await container.exec({ Cmd: ['cat'], AttachStdin: true, AttachStdout: true, AttachStderr: true });
  const stream = await exec.start({ hijack: true, stdin: true });
  const echoed = collector();
  docker.modem.demuxStream(stream, echoed.stream, process.stderr);
  stream.end('through');
  await ended(stream);
  assert.strictEqual(echoed.text(), 'through');
  while ((await exec.inspect()).Running) await new Promise(resolve => setTimeout(resolve, 20));
  assert.strictEqual((await exec.inspect()).ExitCode, 0);

  const stats = await container.stats({ stream: false });
  assert.ok(stats.memory_stats.usage > 0);
  assert.strictEqual((await container.top()).Titles[0], 'UID');
  await container.pause();
  await container.unpause();
  await container.rename({ name: 'rode-on' });
  await container.kill();
  assert.strictEqual((await container.wait()).StatusCode, 137);
  await container.remove();
  await assert.rejects(container.inspect(), err => err.statusCode === 404 && /No such container/.test(err.message));

  const talker = await docker.createContainer({ Image: IMAGE, Cmd: ['sh', '-c', 'echo one; echo two >&2'] });
  const attached = await talker.attach({ stream: true, stdout: true, stderr: true });
  const both = [collector(), collector()];
  talker.modem.demuxStream(attached, both[0].stream, both[1].stream);
  const over = ended(attached); // listening before the start: it may be over before the start is answered
  await talker.start();
  await over;
  assert.deepStrictEqual(both.map(each => each.text()), ['one\n', 'two\n']);
  assert.match((await talker.logs({ stdout: true, stderr: true })).toString(), /one\n/);
  await talker.remove();

  const volume = await docker.createVolume({ Name: 'rode-volume' });
  assert.strictEqual((volume.Name || volume.name), 'rode-volume');
  await docker.getVolume('rode-volume').remove();
  assert.ok((await docker.listNetworks()).some(each => each.Name === 'none'));
  console.log('all is well');
}

main().catch(err => {
  console.error(err);
  process.exit(1);
});
