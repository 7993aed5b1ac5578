package api

import (
	"os"
	"os/user"
	"strconv"

	"github.com/labstack/echo/v4"
	"golang.org/x/sys/unix"

	"yinjian/appliance/problem"
)

// A Session is who asks something of the administration.
type Session struct {
	Administrator string // id; "" on an open local socket
	Name          string // as the journal has it
	Role          Role

	open bool // whoever the local socket lets in, who may do everything
}

// sessionOf says who asks: on the local socket root and the appliance's own user.
func (s *Server) sessionOf(c echo.Context) (*Session, *problem.Problem) {
	peer, ok := c.Request().Context().Value(peerKey{}).(*unix.Ucred)
	if !ok || peer == nil {
		return nil, problem.New(problem.Forbidden, "无法确认本机调用者 (the kernel does not say who calls)", "请通过本机管理套接字访问 (use the local socket)")
	}
	sess := &Session{Name: actorOf(peer.Uid), open: true}
	exchangeOf(c).operator = sess.Name
	if peer.Uid != 0 && int(peer.Uid) != os.Getuid() {
		return nil, problem.New(problem.Forbidden, "该用户不能管理设备 (this user may not administer the appliance)", "请使用 root 或设备服务用户 (use root or the service's user)")
	}
	return sess, nil
}

// actor is who the journal says it was.
func (sess *Session) actor() string { return sess.Name }

func actorOf(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return "local uid=" + id + "(" + u.Username + ")"
	}
	return "local uid=" + id // a user without a name is still one user
}
