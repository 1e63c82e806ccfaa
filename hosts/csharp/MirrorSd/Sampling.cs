using System;
using System.Collections.Generic;
using System.Linq;

namespace MirrorSd
{
    /// <summary>The law of sampling alone (docs/sampling.md), for programs that check themselves against
    /// tests/vectors.</summary>
    public static class Sampling
    {
        /// <summary>The uniform in (0, 1) of a seed, an absolute position and a token.</summary>
        public static double Uniform(ulong seed, ulong position, uint token) =>
            Native.mirror_uniform(seed, position, token);

        /// <summary>The token that the target takes at a position, from its logits and the context's tokens.</summary>
        public static long Choose(float[] logits, IEnumerable<long> context, GenerateOptions options, ulong position)
        {
            using (var memory = new NativeMemory())
            {
                var given = options.ToNative(memory);
                var seen = context.ToArray();
                Interop.Check(Native.mirror_choose_token(
                    logits, (UIntPtr)logits.Length, seen, (UIntPtr)seen.Length, ref given, position, out var token));
                return token;
            }
        }
    }
}
