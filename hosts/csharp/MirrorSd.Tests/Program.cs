// The vectors that all hosts share, from C#: MirrorSd.Tests VECTORS BUNDLES [BUNDLE CASES]. BUNDLES is what
// `python -m tests.vectors.generate --bundles` wrote; BUNDLE has a tokenizer, and CASES what Python says of it.

using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text.Json;
using System.Threading;
using MirrorSd;

internal static class Program
{
    private static int _passed;
    private static int _failed;

    private static int Main(string[] arguments)
    {
        if (arguments.Length != 2 && arguments.Length != 4)
        {
            Console.Error.WriteLine("usage: MirrorSd.Tests VECTORS BUNDLES [BUNDLE CASES]");
            return 2;
        }
        string vectors = arguments[0], bundles = arguments[1];
        Group("noise", () => Noise(Read(vectors, "noise")));
        Group("sampling", () => SamplingCases(Read(vectors, "sampling")));
        Group("manifests", () => Manifests(Read(vectors, "manifests")));
        Group("generations", () => Generations(Read(vectors, "generations"), bundles));
        Group("chat", () => Chat(Read(vectors, "chat"), bundles));
        Group("faults", () => Faults(Path.Combine(bundles, "context")));
        if (arguments.Length == 4)
        {
            Group("text", () => Text(arguments[2], JsonDocument.Parse(File.ReadAllText(arguments[3])).RootElement));
        }
        Console.WriteLine($"{_passed} passed, {_failed} failed");
        return _failed == 0 ? 0 : 1;
    }

    private static JsonElement Read(string folder, string name) =>
        JsonDocument.Parse(File.ReadAllText(Path.Combine(folder, name + ".json"))).RootElement;

    private static void Check(bool holds, string what)
    {
        if (holds)
        {
            ++_passed;
            return;
        }
        ++_failed;
        Console.WriteLine("FAILED " + what);
    }

    private static void Group(string name, Action run)
    {
        try
        {
            run();
        }
        catch (Exception error)
        {
            Check(false, name + ": " + error);
        }
    }

    private static void Refused(string name, ErrorCode code, string text, Action run)
    {
        try
        {
            run();
            Check(false, name + ": nothing was refused");
        }
        catch (MirrorException error)
        {
            Check(error.Code == code && error.Message.Contains(text), name + ": " + error.Message);
        }
    }

    private static long[] Longs(JsonElement list) => list.EnumerateArray().Select(item => item.GetInt64()).ToArray();

    private static GenerateOptions SamplingOf(JsonElement from) => new GenerateOptions
    {
        Temperature = from.GetProperty("temperature").GetDouble(),
        TopK = from.GetProperty("top_k").GetInt64(),
        TopP = from.GetProperty("top_p").GetDouble(),
        MinP = from.GetProperty("min_p").GetDouble(),
        RepetitionPenalty = from.GetProperty("repetition_penalty").GetDouble(),
        Seed = ulong.Parse(from.GetProperty("seed").GetString()),
    };

    private static void Noise(JsonElement noise)
    {
        foreach (var item in noise.GetProperty("uniforms").EnumerateArray())
        {
            var seed = ulong.Parse(item.GetProperty("seed").GetString());
            var found = Sampling.Uniform(seed, item.GetProperty("position").GetUInt64(), item.GetProperty("token").GetUInt32());
            Check(found == item.GetProperty("uniform").GetDouble(), "uniform " + item);
        }
    }

    private static float[] LogitsOf(JsonElement from)
    {
        if (from.TryGetProperty("values", out var values))
        {
            return values.EnumerateArray()
                .Select(value => value.ValueKind == JsonValueKind.Null ? float.NegativeInfinity : value.GetSingle()).ToArray();
        }
        double spread = from.GetProperty("spread").GetDouble();
        ulong seed = from.GetProperty("seed").GetUInt64();
        return Enumerable.Range(0, from.GetProperty("vocab").GetInt32())
            .Select(token => (float)(spread * (2.0 * Sampling.Uniform(seed, 0, (uint)token) - 1.0))).ToArray();
    }

    private static void SamplingCases(JsonElement cases)
    {
        foreach (var item in cases.EnumerateArray())
        {
            var logits = LogitsOf(item.GetProperty("logits"));
            var context = Longs(item.GetProperty("context"));
            var options = SamplingOf(item.GetProperty("sampling"));
            var positions = item.GetProperty("positions").EnumerateArray().Select(position => position.GetUInt64()).ToArray();
            var tokens = Longs(item.GetProperty("tokens"));
            // One sampler's context is the same for all positions: nothing is committed between them.
            for (var index = 0; index < positions.Length; ++index)
            {
                Check(Sampling.Choose(logits, context, options, positions[index]) == tokens[index], "sampling " + item);
            }
        }
    }

    private static void Manifests(JsonElement manifests)
    {
        var folder = Path.Combine(Path.GetTempPath(), "mirror-csharp-" + Guid.NewGuid().ToString("N"));
        Directory.CreateDirectory(folder);
        var file = manifests.GetProperty("file");
        File.WriteAllText(Path.Combine(folder, file.GetProperty("name").GetString()), file.GetProperty("content").GetString());
        var manifest = manifests.GetProperty("manifest").GetString();
        foreach (var item in manifests.GetProperty("cases").EnumerateArray())
        {
            string from = item.GetProperty("from").GetString(), to = item.GetProperty("to").GetString();
            var at = manifest.IndexOf(from, StringComparison.Ordinal);
            File.WriteAllText(Path.Combine(folder, "mirror.json"), manifest.Remove(at, from.Length).Insert(at, to));
            var name = "manifest " + item.GetProperty("name").GetString();
            if (item.GetProperty("error").ValueKind == JsonValueKind.Null)
            {
                Engine.CheckBundle(folder);
                Check(true, name);
            }
            else
            {
                Refused(name, ErrorCode.Bundle, item.GetProperty("error").GetString(), () => Engine.CheckBundle(folder));
            }
        }
        Directory.Delete(folder, true);
    }

    private static Mode ModeOf(JsonElement text) => Enum.Parse<Mode>(text.GetString(), true);

    private static int[] CountsOf(JsonElement list) => list.ValueKind == JsonValueKind.Null
        ? null : list.EnumerateArray().Select(count => count.GetInt32()).ToArray();

    private static int? NumberOf(JsonElement number) => number.ValueKind == JsonValueKind.Null
        ? (int?)null : number.GetInt32();

    private static void Generations(JsonElement cases, string bundles)
    {
        foreach (var item in cases.EnumerateArray())
        {
            var modes = item.GetProperty("modes").EnumerateArray().ToArray();
            var load = new LoadOptions
            {
                Mode = ModeOf(modes[modes.Length - 1]),
                Candidates = Candidates.Both,
                Threads = 1,
                TokensPerPass = CountsOf(item.GetProperty("tokens_per_pass")),
                BranchesPerPass = CountsOf(item.GetProperty("branches_per_pass")),
                ProposalTokensPerPass = CountsOf(item.GetProperty("proposal_tokens_per_pass")),
                DraftContext = NumberOf(item.GetProperty("draft_context")),
            };
            using (var engine = Engine.Load(Path.Combine(bundles, item.GetProperty("bundle").GetString()), load))
            {
                foreach (var mode in modes)
                {
                    Generation(engine, item, mode);
                }
            }
        }
    }

    private static void Generation(Engine engine, JsonElement item, JsonElement mode)
    {
        var options = SamplingOf(item.GetProperty("sampling"));
        options.Mode = ModeOf(mode);
        options.MaxNewTokens = item.GetProperty("max_new_tokens").GetInt64();
        var expected = Longs(item.GetProperty("tokens"));
        var name = $"generation {mode} {item}";
        using (var answer = engine.Start(Longs(item.GetProperty("prompt")), options))
        {
            var pieces = answer.SelectMany(piece => piece.Tokens).ToArray();
            Check(pieces.SequenceEqual(expected) && answer.Tokens.SequenceEqual(expected), name);
            Check(answer.FinishReason.ToString().ToLowerInvariant() == item.GetProperty("finish_reason").GetString(), name);
            Check(answer.Events.Count == 0 && answer.Text == null, name);
            var rounds = item.GetProperty("rounds").GetProperty(mode.GetString()).EnumerateArray().Select(round => round.ToString());
            var found = answer.Rounds.Select(round =>
                $"[{round.Proposed}, {round.Accepted}, {round.Committed}, {(round.Reused?.ToString() ?? "null").ToLowerInvariant()}, {round.Branches}]");
            Check(found.SequenceEqual(rounds), name + " rounds");
            Check(answer.Statistics.GeneratedTokens == expected.Length, name + " statistics");
        }
    }

    private static void Faults(string bundle)
    {
        Refused("no folder", ErrorCode.Bundle, "the folder does not exist", () => Engine.Load(bundle + "-not"));
        Refused("device", ErrorCode.Device, "no device is called 'tpu'", () => Engine.Load(bundle, new LoadOptions { TargetDevice = "tpu" }));
        Refused("gamma", ErrorCode.Request, "Gamma is 0", () => Engine.Load(bundle, new LoadOptions { Gamma = 0 }));
        Refused("branches", ErrorCode.Request, "branches_per_pass is (1, 2)",
            () => Engine.Load(bundle, new LoadOptions { BranchesPerPass = new[] { 1, 2 } }));
        Refused("a proposal", ErrorCode.Request, "proposal_tokens_per_pass is (2,)",
            () => Engine.Load(bundle, new LoadOptions { ProposalTokensPerPass = new[] { 2 } }));
        Refused("a draft's context", ErrorCode.Request, "draft_context is 1; it must be 2 or more",
            () => Engine.Load(bundle, new LoadOptions { DraftContext = 1 }));
        using (var engine = Engine.Load(bundle, new LoadOptions { Threads = 1 }))
        {
            long[] prompt = { 1, 2, 3 };
            Check(engine.Mode == Mode.Mirror && engine.VocabSize == 23 && engine.MaxLength == 64, "facts");
            Check(engine.RecordedPasses == 0 && engine.DraftKernels == null, "facts of devices: graphs on a CPU");
            Check(engine.Notices.Length == 0, "a CPU lacks nothing");
            var path = engine.Start(prompt, new GenerateOptions { MaxNewTokens = 40 });
            Refused("busy", ErrorCode.Busy, "already making an answer", () => engine.Start(prompt));
            var first = path.Next();
            engine.Cancel();
            Check(path.Next() == null && path.FinishReason == FinishReason.Cancelled && path.Tokens.SequenceEqual(first.Tokens), "cancel");
            path.Dispose();
            using (var answer = engine.Start(prompt, new GenerateOptions { MaxNewTokens = 5 }))
            {
                foreach (var piece in answer)
                {
                    break;
                }
            }
            Refused("capacity", ErrorCode.Capacity, "the cache holds 64", () => engine.Start(new long[64]));
            Refused("no tokenizer", ErrorCode.Request, "no tokenizer.json", () => engine.Encode("x"));
            Refused("temperature", ErrorCode.Request, "temperature is -1", () => engine.Start(prompt, new GenerateOptions { Temperature = -1 }));
        }
        var disposed = Engine.Load(bundle, new LoadOptions { Threads = 1 });
        var last = disposed.Start(new long[] { 1, 2, 3 });
        disposed.Dispose();
        Check(last.Next() == null && last.FinishReason == FinishReason.Cancelled, "an answer outlives its engine");
        last.Dispose();
    }

    private static Message[] MessagesOf(JsonElement list) => list.EnumerateArray()
        .Select(item => new Message(item.GetProperty("role").GetString(), item.GetProperty("content").GetString())).ToArray();

    private static void Chat(JsonElement cases, string bundles)
    {
        foreach (var group in cases.EnumerateArray().GroupBy(item => item.GetProperty("bundle").GetString()))
        {
            using (var engine = Engine.Load(Path.Combine(bundles, group.Key), new LoadOptions { Mode = Mode.Plain, Threads = 1 }))
            {
                // Those of a certain day are for hosts that can be told the day.
                foreach (var item in group.Where(item => item.GetProperty("today").ValueKind == JsonValueKind.Null))
                {
                    ChatCase(engine, item);
                }
            }
        }
    }

    private static void ChatCase(Engine engine, JsonElement item)
    {
        string text = null, error = null;
        try
        {
            text = engine.RenderChat(MessagesOf(item.GetProperty("messages")));
        }
        catch (MirrorException refusal)
        {
            error = refusal.Message;
        }
        Check(text == item.GetProperty("text").GetString() && error == item.GetProperty("error").GetString(), $"chat {item} gave {text}{error}");
    }

    private static void Text(string bundle, JsonElement cases)
    {
        using (var engine = Engine.Load(bundle, new LoadOptions { MaxLength = 200 }))
        {
            foreach (var item in cases.EnumerateArray().Where(item => item.TryGetProperty("text", out _)))
            {
                // A null text stands for token ids that no text gave.
                var text = item.GetProperty("text").GetString();
                var tokens = Longs(item.GetProperty("tokens"));
                Check(text == null || engine.Encode(text, item.GetProperty("special").GetBoolean()).SequenceEqual(tokens), "encode " + text);
                Check(engine.Decode(tokens) == item.GetProperty("decoded").GetString(), "decode " + text);
            }
            foreach (var item in cases.EnumerateArray().Where(item => item.TryGetProperty("answer", out _)))
            {
                Answer(engine, item);
            }
        }
    }

    private static void Answer(Engine engine, JsonElement item)
    {
        var options = SamplingOf(item.GetProperty("sampling"));
        options.Mode = ModeOf(item.GetProperty("mode"));
        options.MaxNewTokens = item.GetProperty("max_new_tokens").GetInt64();
        options.AddSpecialTokens = false;
        options.Stop = item.GetProperty("stop_strings").EnumerateArray().Select(stop => stop.GetString()).ToArray();
        var prompt = item.GetProperty("prompt").GetString();
        var expected = item.GetProperty("answer").GetString();
        var pieces = engine.Stream(prompt, options).ToArray();
        Check(string.Concat(pieces) == expected, $"answer {item.GetProperty("mode")} {string.Concat(pieces)}");
        if (options.Mode != Mode.Mirror)
        {
            return;
        }
        Check(engine.Generate(prompt, options) == expected, "the same at once");
        var messages = MessagesOf(item.GetProperty("messages"));
        Check(engine.RenderChat(messages) == prompt, "the chat format");
        Check(engine.Generate(messages, options) == expected && string.Concat(engine.Stream(messages, options)) == expected, "a conversation");
        using (var cancellation = new CancellationTokenSource())
        {
            var got = new List<string>();
            try
            {
                foreach (var text in engine.Stream(prompt, options, cancellation.Token))
                {
                    got.Add(text);
                    cancellation.Cancel();
                }
                Check(expected.Length == 0 || got.Count == pieces.Length, "a cancelled stream ended without a word");
            }
            catch (OperationCanceledException)
            {
                Check(expected.StartsWith(string.Concat(got), StringComparison.Ordinal), "what came before cancellation is the answer's");
            }
        }
    }
}
