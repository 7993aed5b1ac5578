// Command yinjian is the appliance: it runs it (serve), makes a new one (init), administers a running one (app, signer,
// cert, crl, time, tsa, settings, audit, alarm, report, db, change, handover, preserve, status), checks evidence and timestamps (verify, ts), is the software cipher machine (softtoken), probes one
// (hsm probe) and shows the whole in a minute (demo). Output is for people, -o json for programs; errors go to stderr with
// what to do; it exits 0, 1 (failed) or 2 (misused), and where a command's help says so with other codes.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"yinjian/appliance"
)

// usageError is a mistake in the call, not a failure of the work.
type usageError struct{ error }

// A verdictError is what a command has found: it did its work, and its exit status says what came of it.
type verdictError struct {
	error
	code int
}

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot()
	root.SetArgs(args)
	err := appliance.Harden() // many a command reads a secret
	if err == nil {
		err = root.ExecuteContext(ctx)
	}
	var usage usageError
	var exit exitError
	var verdict verdictError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &verdict):
		fmt.Fprintln(os.Stderr, err)
		return verdict.code
	case errors.As(err, &exit):
		fmt.Fprintln(os.Stderr, "失败 (failed):", err)
		return exit.code
	case errors.As(err, &usage), mistyped(err):
		fmt.Fprintln(os.Stderr, "用法错误 (usage):", err)
		return 2
	default:
		fmt.Fprintln(os.Stderr, "失败 (failed):", err)
		return 1
	}
}

// mistyped knows cobra's own complaints about a call, which have no type.
func mistyped(err error) bool {
	return strings.HasPrefix(err.Error(), "unknown command ") || strings.HasPrefix(err.Error(), "required flag(s) ") ||
		strings.HasPrefix(err.Error(), "if any flags in the group ")
}

// group makes c, which only holds subcommands, refuse a word that is none of them; cobra would show the help and exit 0.
func group(c *cobra.Command) *cobra.Command {
	c.Args = func(c *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageError{fmt.Errorf("%s 没有子命令 %q (no such subcommand)", c.CommandPath(), args[0])}
		}
		return nil
	}
	c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
	return c
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "yinjian",
		Short:         "印鉴：电子病历签名设备 (signing appliance for medical records)",
		Version:       appliance.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(
		initCommand(), serveCommand(), unlockCommand(), startCommand(), provisionCommand(), softtokenCommand(), workerCommand(), hsmCommand(), demoCommand(), benchCommand(), benchPoolCommand(), benchDatabaseCommand(), benchConsoleCommand(), benchGrowthCommand(), benchTSACommand(), benchTSAServerCommand(), benchTSAWorkerCommand(), benchLoadCommand(), benchLoaderCommand(), benchLoadersCommand(), benchSoakCommand(), benchPriceCommand(), benchTargetsCommand(), benchBuyerCommand(), benchCapacityCommand(),
		applicationCommand(), directoryCommand(), signerCommand(), ceremonyCommand(), certificateCommand(), crlCommand(), statusCommand(),
		auditCommand(), databaseCommand(), changeCommand(), handoverCommand(), verifyCommand(), preserveCommand(), backupCommand(), restoreCommand(), drillCommand(), updateCommand(), updateAgentCommand(), packCommand(), packAgentCommand(), timestampCommand(), timeCommand(), stampingCommand(),
		historyCommand(),
		peerCommand(),
		loginCommand(), logoutCommand(), ukeyCommand(), administratorCommand(), approvalCommand(),
		logCommand(), settingsCommand(),
		alarmCommand(), reportCommand(), patrolCommand(), diagCommand(),
		assessCommand(), assessRandomCommand(), originReportCommand(),
		referenceCommand(),
	)
	return root
}

// exactArgs is cobra's, answering a usageError.
func exactArgs(n int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != n {
			return usageError{fmt.Errorf("%s: 需要 %d 个参数，给出 %d 个 (want %d arguments, got %d)", c.CommandPath(), n, len(args), n, len(args))}
		}
		return nil
	}
}

func newLog(level logrus.Level) *logrus.Logger {
	log := logrus.New()
	log.SetOutput(os.Stderr)
	log.SetLevel(level)
	log.SetFormatter(&logrus.TextFormatter{FullTimestamp: true, DisableColors: true})
	return log
}
