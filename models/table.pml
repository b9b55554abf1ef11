/*
 * Drawn from sealane.session.handover and sealane.host.migration.messages by tests/models/table.py; do not edit.
 * ROLE_after(state, input) is the state that follows, or 0 where the code's table has no such step.
 */
mtype:state = { PREPARING, COPYING, SWITCHING_OVER, HANDING_OVER, POSTCOPY, POSTCOPY_PAUSED, COMPLETED, ABORTED, IN_DOUBT };
mtype:input = { PREPARED, VM_STOPPED, RELEASED, NOT_SENT, TICKET_JOURNALLED, TICKET_HELD, SWITCHED, REJOINED, ARRIVED, RECEIPT, FAILED, REFUSED, OWN_HERE, DROP_HERE };
mtype:message = { prepare, prepared, loaded, ticket, receipt, ticket_refused, receipt_copy, postcopy_ticket, ticket_held, arrived, rejoin, rejoined, ask, ran, promise, unsettled };

#define source_after(state, input) \
	((state) == PREPARING && (input) == PREPARED -> COPYING : \
	((state) == PREPARING && (input) == FAILED -> ABORTED : \
	((state) == COPYING && (input) == VM_STOPPED -> SWITCHING_OVER : \
	((state) == COPYING && (input) == FAILED -> ABORTED : \
	((state) == SWITCHING_OVER && (input) == RELEASED -> HANDING_OVER : \
	((state) == SWITCHING_OVER && (input) == SWITCHED -> POSTCOPY : \
	((state) == SWITCHING_OVER && (input) == FAILED -> ABORTED : \
	((state) == HANDING_OVER && (input) == RECEIPT -> COMPLETED : \
	((state) == HANDING_OVER && (input) == REFUSED -> ABORTED : \
	((state) == HANDING_OVER && (input) == NOT_SENT -> ABORTED : \
	((state) == HANDING_OVER && (input) == FAILED -> IN_DOUBT : \
	((state) == IN_DOUBT && (input) == RECEIPT -> COMPLETED : \
	((state) == IN_DOUBT && (input) == REFUSED -> ABORTED : \
	((state) == IN_DOUBT && (input) == OWN_HERE -> ABORTED : \
	((state) == IN_DOUBT && (input) == DROP_HERE -> COMPLETED : \
	((state) == IN_DOUBT && (input) == FAILED -> IN_DOUBT : \
	((state) == POSTCOPY && (input) == ARRIVED -> COMPLETED : \
	((state) == POSTCOPY && (input) == FAILED -> POSTCOPY_PAUSED : \
	((state) == POSTCOPY && (input) == REFUSED -> ABORTED : \
	((state) == POSTCOPY_PAUSED && (input) == REJOINED -> POSTCOPY : \
	((state) == POSTCOPY_PAUSED && (input) == ARRIVED -> COMPLETED : \
	((state) == POSTCOPY_PAUSED && (input) == DROP_HERE -> COMPLETED : \
	((state) == POSTCOPY_PAUSED && (input) == FAILED -> POSTCOPY_PAUSED : \
	((state) == POSTCOPY_PAUSED && (input) == REFUSED -> ABORTED : \
	((state) == POSTCOPY_PAUSED && (input) == OWN_HERE -> ABORTED : \
	0)))))))))))))))))))))))))

#define destination_after(state, input) \
	((state) == PREPARING && (input) == PREPARED -> COPYING : \
	((state) == PREPARING && (input) == FAILED -> ABORTED : \
	((state) == COPYING && (input) == VM_STOPPED -> SWITCHING_OVER : \
	((state) == COPYING && (input) == FAILED -> ABORTED : \
	((state) == COPYING && (input) == TICKET_HELD -> SWITCHING_OVER : \
	((state) == SWITCHING_OVER && (input) == TICKET_JOURNALLED -> HANDING_OVER : \
	((state) == SWITCHING_OVER && (input) == SWITCHED -> POSTCOPY : \
	((state) == SWITCHING_OVER && (input) == REFUSED -> ABORTED : \
	((state) == SWITCHING_OVER && (input) == FAILED -> ABORTED : \
	((state) == HANDING_OVER && (input) == RECEIPT -> COMPLETED : \
	((state) == HANDING_OVER && (input) == FAILED -> COMPLETED : \
	((state) == HANDING_OVER && (input) == REFUSED -> ABORTED : \
	((state) == POSTCOPY && (input) == ARRIVED -> COMPLETED : \
	((state) == POSTCOPY && (input) == FAILED -> POSTCOPY_PAUSED : \
	((state) == POSTCOPY_PAUSED && (input) == REJOINED -> POSTCOPY : \
	((state) == POSTCOPY_PAUSED && (input) == ARRIVED -> COMPLETED : \
	((state) == POSTCOPY_PAUSED && (input) == DROP_HERE -> COMPLETED : \
	((state) == POSTCOPY_PAUSED && (input) == FAILED -> POSTCOPY_PAUSED : \
	0))))))))))))))))))
