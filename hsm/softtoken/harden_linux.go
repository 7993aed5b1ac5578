package softtoken

import (
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// harden keeps the process's memory from being written anywhere or read by another process of the same user: no core
// dumps, no ptrace or /proc/PID/mem, no swap. What the system refuses is logged; the service manager's limits may
// forbid it.
func harden(log logrus.FieldLogger) {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		log.WithError(err).Warn("core dumps cannot be forbidden")
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		log.WithError(err).Warn("the process cannot be made undumpable")
	}
	// With a finite limit, locking future pages would make the Go runtime's next reservation of address space fail,
	// which ends the process. So memory is locked where there is no limit or it does not bind.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil || limit.Cur != unix.RLIM_INFINITY && !mayLock() {
		log.Warn("memory is not locked and keys may be swapped out; set LimitMEMLOCK=infinity")
		return
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		log.WithError(err).Warn("memory cannot be locked and keys may be swapped out")
	}
}

// mayLock says whether CAP_IPC_LOCK is in effect.
func mayLock() bool {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&head, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0
}
