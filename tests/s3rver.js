// s3rver as object stores are today: an object is whole or absent whenever the server is killed, and of several writers with
// If-None-Match: * one wins. Arguments: the folder of the package, the folder of the data, the port.
'use strict';
const fs = require('fs');
const path = require('path');
const crypto = require('crypto');
const [, , home, directory, port] = process.argv;
const S3rver = require(home);

fs.mkdirSync(directory, { recursive: true });
const server = new S3rver({ address: '127.0.0.1', port: Number(port), directory, silent: true });

const writeWhole = async (there, content) => {
  const before = path.join(directory, crypto.randomUUID());
  await fs.promises.writeFile(before, content);
  await fs.promises.rename(before, there);
};

server.store.putMetadata = async function (bucket, key, metadata, md5) {
  if (md5) await writeWhole(this.getResourcePath(bucket, key, 'object.md5'), md5);
  await writeWhole(this.getResourcePath(bucket, key, 'metadata.json'), JSON.stringify(metadata));
};

// The object goes first: without it, what describes it is nothing.
const deleteObject = server.store.deleteObject;
server.store.deleteObject = async function (bucket, key) {
  await fs.promises.rm(this.getResourcePath(bucket, key, 'object'), { force: true });
  return deleteObject.call(this, bucket, key);
};

server.store.putObject = async function (object) {
  const pieces = [];
  if (Buffer.isBuffer(object.content)) pieces.push(object.content);
  else for await (const piece of object.content) pieces.push(piece);
  const content = Buffer.concat(pieces);
  const md5 = crypto.createHash('md5').update(content).digest('hex');
  const there = this.getResourcePath(object.bucket, object.key, 'object');
  await fs.promises.mkdir(path.dirname(there), { recursive: true });
  await this.putMetadata(object.bucket, object.key, object.metadata, md5);
  await writeWhole(there, content);
  return { size: content.length, md5 };
};

let last = Promise.resolve();
server.middleware.unshift(async (context, next) => {
  if (!['PUT', 'POST'].includes(context.method) || context.get('if-none-match') !== '*') return next();
  const turn = last;
  let done;
  last = new Promise(resolve => (done = resolve));
  await turn;
  try {
    const [, bucket, ...key] = decodeURIComponent(context.path).split('/');
    if (!fs.existsSync(server.store.getResourcePath(bucket, key.join('/'), 'object'))) return await next();
    context.status = 412;
    context.type = 'application/xml';
    context.body = '<?xml version="1.0"?><Error><Code>PreconditionFailed</Code><Message>It is there.</Message></Error>';
  } finally {
    done();
  }
});

server.run().catch(error => {
  console.error(error);
  process.exit(1);
});
