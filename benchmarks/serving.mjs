// Greedy continuations of token ids by llama.cpp, through the npm package node-llama-cpp (its own prebuilt binaries).
//
//     node serving.mjs FOLDER JOB RESULT
// FOLDER: where its node_modules lies. JOB: {model, adapter or null, prompts: [[id]], texts: [text], new, top}. RESULT:
// {version, tokens: [[id]] of the texts, steps: [[[[id, log-probability]]]]: the `top` likeliest at each new token}.
// The KV cache is F32: llama.cpp's default is F16, which rounds keys and values.
import fs from "fs";
import path from "path";
import {pathToFileURL} from "url";

const [, , folder, jobFile, resultFile] = process.argv;
const home = path.resolve(folder, "node_modules", "node-llama-cpp");
const {getLlama} = await import(pathToFileURL(path.join(home, "dist", "index.js")).href);
const job = JSON.parse(fs.readFileSync(jobFile, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: job.model});
const context = await model.createContext({
    contextSize: 512, threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    ...(job.adapter === null ? {} : {lora: {adapters: [{filePath: job.adapter, scale: 1}]}})
});
const sequence = context.getSequence();
const steps = [];
for (const prompt of job.prompts) {
    await sequence.clearHistory();
    const found = [];
    for await (const {probabilities} of sequence.evaluateWithMetadata(prompt, {probabilities: true}, {temperature: 0, yieldEogToken: true})) {
        const likely = [...probabilities].sort((a, b) => b[1] - a[1]).slice(0, job.top);
        found.push(likely.map(([id, share]) => [id, Math.log(share)]));
        if (found.length === job.new) break;
    }
    steps.push(found);
}
const tokens = job.texts.map((text) => model.tokenize(text, true));
const own = JSON.parse(fs.readFileSync(path.join(home, "package.json"), "utf8")).version;
const version = `llama.cpp ${llama.llamaCppRelease.release} (node-llama-cpp ${own})`;
fs.writeFileSync(resultFile, JSON.stringify({version, tokens, steps}));
process.exit(0);
