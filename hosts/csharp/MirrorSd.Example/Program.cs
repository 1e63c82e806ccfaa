// Answers a question with a bundle, piece by piece:
//
//   dotnet run -- BUNDLE "Why is the sky blue?" [TARGET_DEVICE [DRAFT_DEVICE]]
//
// Ctrl-C ends the answer after the round under way.

using System;
using System.Threading;
using MirrorSd;

internal static class Program
{
    private static int Main(string[] arguments)
    {
        if (arguments.Length < 2)
        {
            Console.Error.WriteLine("usage: MirrorSd.Example BUNDLE QUESTION [TARGET_DEVICE [DRAFT_DEVICE]]");
            return 2;
        }
        var load = new LoadOptions
        {
            TargetDevice = arguments.Length > 2 ? arguments[2] : null,
            DraftDevice = arguments.Length > 3 ? arguments[3] : null,
        };
        var options = new GenerateOptions { MaxNewTokens = 200 };
        var messages = new[] { new Message("user", arguments[1]) };
        try
        {
            using (var cancellation = new CancellationTokenSource())
            using (var engine = Engine.Load(arguments[0], load))
            {
                Console.CancelKeyPress += (sender, press) =>
                {
                    press.Cancel = true;
                    cancellation.Cancel();
                };
                foreach (var text in engine.Stream(messages, options, cancellation.Token))
                {
                    Console.Write(text);
                }
                Console.WriteLine();
            }
            return 0;
        }
        catch (Exception error) when (error is MirrorException || error is OperationCanceledException)
        {
            Console.Error.WriteLine($"error: {error.Message}");
            return 1;
        }
    }
}
