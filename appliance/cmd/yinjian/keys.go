package main

import (
	"context"
	"encoding/json"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
)

func keysCommand() *cobra.Command {
	return adminCommand("keys", "密钥清单：属性由密码机回读、产生、启用、使用次数、到期 (every key: attributes read back, birth, uses, when it is due)", 0, nil,
		func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			return a.ListKeys(ctx)
		})
}

func destroyKeyCommand() *cobra.Command {
	var reason string
	return adminCommand("destroy LABEL", "销毁签名人不再使用的密钥，记入日志 (destroy a signer's key that is not used any more, with a record)", 1,
		func(c *cobra.Command) { required(c, &reason, "reason", "原因，记入日志 (why, for the journal)") },
		func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			return a.DestroyKey(ctx, wire.DestroyKey{Label: args[0], Reason: reason})
		})
}
