/*
 * The hand-over of one VM by postcopy: given up with the ticket, run on half of its memory, joined again after cuts.
 *
 * What is modelled
 *   Two agents, each a process whose memory is lost when it is killed and whose journal is not, as in handover.pml; their QEMUs,
 *   which do not need them; and what carries words (`channel`) and memory (`lanes`) between the hosts. An enclave that dies, a
 *   forged record, a link that is cut, an agent that dies with its enclaves: each breaks both. A destination's enclave may outlive
 *   its agent once QEMU has switched (`orphan`): words are lost, the lanes hold, and are closed when all of the memory went. A
 *   word that was said may be heard until there is a new channel, or never. A write of the journal is a step of its own, and may
 *   fail. Before the VM is given up whoever waits may give up at any moment; afterwards an end goes on trying. `fate` kills agents
 *   and QEMUs and cuts, CRASHES times in all.
 *   QEMU, as far as it decides: what a destination lacks to run the VM comes with the source's switch alone, and a destination
 *   whose stream ends before it ends itself. A source that has switched (HALF) takes no command that lets the VM run there, but can
 *   be made to (`run_unshared`): that is safe only where the destination refused. A switch that fails before anything has left
 *   makes it PAUSED, and so may one that fails when all has left already.
 *
 * What is not
 *   The copy that ends by itself, epochs, several migrations (handover.pml); pages one by one: all of them are there, or not.
 *
 * What no safeguard helps against, and the claims leave out
 *   The loss of a QEMU that holds a half, and a switch that all came through, but for the source's QEMU, which calls it failed
 *   (`split_switch`): then both have the VM, neither gives it up, and nothing can be joined. That one copy is kept is claimed; where
 *   the destination's is lost, an operator may say that the VM is the source's.
 *
 * The names are those of the code, and the table is drawn from it: table.pml. Each safeguard can be taken out, and the checks
 * then fail (tests/models/test_postcopy_model.py):
 *   -DSWITCH_BEFORE_JOURNAL   the source's QEMU is told to switch before `postcopy` is journalled
 *   -DTICKET_LETS_RUN         the destination lets the VM run once it holds the ticket, as by precopy
 *   -DTAKE_BACK_WHEN_CUT      a source that gave the VM up resumes it when the lanes break
 *   -DRECLAIM_AFTER_SWITCHED  ... or when it is started again
 *   -DQEMU_PAUSES_THE_VM      the source leaves it to QEMU to pause the VM: a switch that fails lets it run by itself
 *   -DREFUSE_WITHOUT_LOOKING  a destination that holds the ticket destroys its QEMU without asking whether it has switched
 *   -DLOOK_BEFORE_CUT         ... or asks while the lanes may still bring what it lacks
 *   -DFORGET_THE_HALF         a destination that is started again destroys what it has launched, as before the ticket
 *   -DRECEIPT_ENDS_THE_HALF   the source ends its QEMU when the VM runs there, and not when all of it is there
 *   -DWAIT_FOR_ARRIVED        a source whose lanes were closed in order waits for the destination's word, and does not ask
 *   -DDROP_WITHOUT_LOOKING    an operator has a half ended whose other half is not lost
 *   -DOWN_WITHOUT_LOOKING     ... or the VM run at a source that has it whole, while the destination has it too
 *   -DJOIN_BEFORE_ASKING      a source whose QEMU is in no postcopy does not ask the destination what became of the VM
 *   -DRUN_UNREFUSED           a source whose QEMU believes in postcopy is made to run the VM when it is parted, and not refused
 *   -DLEAVE_UNSHARED          ... or never, as long as QEMU believes in postcopy
 */
#include "table.pml"

#ifndef CRASHES
#define CRASHES 2
#endif

#ifdef CLAIMS_ONLY	/* look for what must never be itself, not for the first step that is wrong */
#define must(condition) true
#else
#define must(condition) assert(condition)
#endif

/* No QEMU; one that waits for the stream, and has nothing that it could run; one that holds the VM paused; one that serves pages
   of a VM that it gave away; one in which the VM runs. */
mtype:copy = { GONE, WAITING, PAUSED, HALF, RUNNING };
mtype:copy source_qemu = RUNNING, destination_qemu = GONE;
bool in_switch;		/* the devices' state is on its way */
bool whole;		/* all of the memory is at the destination */
bool came_through, ran_there;	/* at some time the destination's QEMU had all that it needs to run the VM; and ran it */
bool split_switch, source_lost, destination_lost;

/* Disks. */
mtype:state source_journal = COMPLETED, destination_journal = COMPLETED;
bool begun, taken;	/* each end knows of the migration */
bool destination_nowhere;	/* `completed`, and the VM was lost there */

/* Memory. */
mtype:state source_state = COMPLETED, destination_state = COMPLETED;
bool destination_listens;	/* its QEMU, for the other half */

/* Between the hosts. */
bool channel, lanes, was_connected;
bool orphan;	/* the lanes are those of a destination's enclave that has outlived its agent */
#ifdef WAIT_FOR_ARRIVED
bool said_bye;	/* ... and closed them in order */
#define hears_no_cut said_bye
#else
#define hears_no_cut false
#endif
int said;		/* bit k: message of kind k, over the last channel */

bool kill_source, kill_destination;
bool source_at_rest, destination_at_rest;
byte crashes;

#define was_said(kind) (said & (1 << kind))
#define has_switched (destination_qemu == PAUSED || destination_qemu == RUNNING)
#ifdef REFUSE_WITHOUT_LOOKING
#define may_have_switched false
#else
#define may_have_switched has_switched
#endif
/* what an operator has seen who has a half ended */
#ifdef DROP_WITHOUT_LOOKING
#define lost_there true
#define lost_at_the_source true
#else
#define lost_there (destination_lost && destination_qemu == GONE)
#define lost_at_the_source (source_lost && source_qemu == GONE)
#endif
#ifdef OWN_WITHOUT_LOOKING
#define never_there true
#else
#define never_there (destination_lost && destination_qemu == GONE)
#endif
#ifdef JOIN_BEFORE_ASKING
#define may_ask (source_qemu == HALF)
#else
#define may_ask true
#endif
#define ended(state) (state == COMPLETED || state == ABORTED)
#define destination_wrote (destination_journal == destination_state)
#define source_wrote (source_journal == source_state || source_state == POSTCOPY_PAUSED)	/* postcopy recovers as that does */
#define answers (destination_at_rest && !kill_destination && taken && destination_wrote && \
	(destination_state == ABORTED || (destination_state == COMPLETED && !destination_nowhere) || \
	 (destination_state == POSTCOPY_PAUSED && destination_qemu != GONE)))

inline say(kind) {
	if
	:: channel -> said = said | (1 << kind)
	:: else		/* nobody carries it */
	fi
}

inline part() {
	lanes = false; destination_listens = false; orphan = false; in_switch = false
}

inline cut() {
	channel = false;
	part()
}

/* Copies. */

inline resume_source() {
	d_step {
		if
		:: source_qemu == PAUSED -> source_qemu = RUNNING; must(!has_switched)
		:: else
		fi
	}
}

/* ... although its QEMU takes it to be in two halves; only once the journal knows why. */
inline run_unshared() {
#ifndef LEAVE_UNSHARED
	d_step {
		if
		:: source_qemu == HALF && source_journal == ABORTED -> source_qemu = RUNNING; must(!ran_there)
		:: else
		fi
	}
#else
	skip
#endif
}

inline quit_source() {
	d_step {
		if
		:: source_qemu != GONE -> must(source_qemu != RUNNING && (whole || destination_lost)); source_qemu = GONE
		:: else
		fi
	}
}

inline destroy_destination() {
	d_step {
		if
		:: destination_qemu != GONE ->
			must(!has_switched);
			destination_qemu = GONE;
			part()
		:: else
		fi
	}
}

inline resume_destination() {
	d_step {
		if
		:: destination_qemu == PAUSED -> destination_qemu = RUNNING; ran_there = true
		:: else
		fi
	}
}

/* QEMU is told to switch. */
inline let_switch() {
	if
	:: atomic { source_qemu == PAUSED && lanes -> source_qemu = HALF; in_switch = true }
	/* all has left, and then the lanes break before QEMU has said its last word: for it the switch failed */
	:: atomic { source_qemu == PAUSED && lanes && crashes < CRASHES && destination_qemu == WAITING ->
		crashes++; destination_qemu = PAUSED; came_through = true; split_switch = true;
#ifdef QEMU_PAUSES_THE_VM
		source_qemu = RUNNING;
#endif
		cut()
	   }
	/* the lanes were gone: nothing has left; or QEMU's socket was not closed yet, and took it */
	:: atomic { source_qemu == PAUSED && !lanes }
	:: atomic { source_qemu == PAUSED && !lanes -> source_qemu = HALF }
	:: source_qemu != PAUSED
	fi
}

/* Transitions: journalled and then followed, or followed and journalled later. */

inline source_step(happened) {
	source_journal = source_after(source_state, happened);
	source_state = source_journal
}

inline destination_step(happened) {
	destination_journal = destination_after(destination_state, happened);
	destination_state = destination_journal
}

inline source_end() {
	if
	:: source_journal = source_state
	:: true
	fi
}

inline destination_end() {
	if
	:: destination_journal = destination_state
	:: true
	fi
}

/* ------------------------------------------------------------------------------------------------ source */

active proctype source() {

start:	{
		/* recovery, as host/recovery.py */
		if
		:: source_journal == PREPARING || source_journal == COPYING || source_journal == SWITCHING_OVER ->
			resume_source();
			source_journal = ABORTED
		:: source_journal == POSTCOPY || source_journal == POSTCOPY_PAUSED ->
#ifdef RECLAIM_AFTER_SWITCHED
			resume_source();
			source_journal = ABORTED
#else
			if
			:: source_qemu == RUNNING -> source_journal = ABORTED	/* the refusal came, but not its entry */
			:: else -> source_journal = POSTCOPY_PAUSED
			fi
#endif
		:: source_journal == COMPLETED && begun -> quit_source()
		:: source_journal == ABORTED -> resume_source(); run_unshared()	/* `aborted`, but not ended */
		:: else
		fi;
		source_state = source_journal;
		if
		:: source_state == POSTCOPY_PAUSED -> goto join
		:: source_state != POSTCOPY_PAUSED && begun -> goto rest
		:: !begun
		fi;

		atomic { begun = true; source_journal = PREPARING; source_state = PREPARING; channel = true };
		say(prepare);
		if
		:: was_said(prepared)
		:: true -> goto give_up
		fi;
		source_step(PREPARED);
		if
		:: atomic { channel && destination_qemu == WAITING -> lanes = true; was_connected = true }
		:: true -> goto give_up
		fi;

		/* no end of the copy is in sight */
		source_step(VM_STOPPED);	/* journalled first: who finds the VM paused must know by whom */
		if
		:: atomic { source_qemu == RUNNING -> source_qemu = PAUSED }
		:: true -> goto give_up
		fi;
		say(postcopy_ticket);
		if
		:: was_said(ticket_held)
		:: true -> goto give_up
		fi;
#ifdef SWITCH_BEFORE_JOURNAL
		let_switch();
#endif
		if
		:: source_journal = source_after(source_state, SWITCHED)
		:: true -> goto give_up
		fi;
		source_state = source_journal;
#ifndef SWITCH_BEFORE_JOURNAL
		if
		:: let_switch()
		:: !lanes	/* known before QEMU was told */
		fi;
#endif

serve:		if
		:: was_said(arrived) -> goto hears_arrived
		:: was_said(ticket_refused) -> goto hears_refusal
#ifdef RECEIPT_ENDS_THE_HALF
		:: was_said(receipt) -> goto hears_arrived
#endif
		:: !lanes && !hears_no_cut
		fi;
		d_step { cut() };
		source_state = source_after(source_state, FAILED);
		source_end();
#ifdef TAKE_BACK_WHEN_CUT
		resume_source();
		source_state = ABORTED;
		goto ended;
#endif
#ifdef RUN_UNREFUSED
		d_step {
			if
			:: source_qemu == HALF -> source_qemu = RUNNING
			:: else
			fi
		};
		source_state = ABORTED;
		goto ended;
#endif

		/* again and again; here: as soon as somebody is there who answers, and not where an answer changes nothing */
join:		source_at_rest = true;
endjoin:	if
		:: atomic { answers && may_ask -> source_at_rest = false; channel = true; said = 0 }
		:: atomic { lost_there -> source_at_rest = false }	/* an operator's word */
			source_step(DROP_HERE);
			quit_source();
			goto ended
		:: atomic { never_there && source_qemu == PAUSED -> source_at_rest = false }	/* its other word, where the VM is whole here */
			source_step(OWN_HERE);
			resume_source();
			goto ended
		fi;
		say(rejoin);
		if
		:: was_said(arrived) -> goto hears_arrived
		:: was_said(ticket_refused) -> goto hears_refusal
		:: atomic { was_said(rejoined) && channel && destination_listens && source_qemu == HALF ->
			lanes = true; destination_listens = false
		   }
		:: was_said(rejoined) && source_qemu != HALF ->	/* nothing to join */
			atomic { cut(); source_at_rest = true };
endlost:		false
		:: !channel ->
			source_state = source_after(source_state, FAILED);
			goto join
		fi;
		if
		:: source_step(REJOINED)
		:: atomic { crashes < CRASHES -> crashes++; cut() }	/* it was not journalled: not joined */
			goto join
		fi;
		goto serve;

hears_arrived:	source_state = source_after(source_state, ARRIVED);
		source_end();
		quit_source();
		goto ended;

hears_refusal:	source_state = source_after(source_state, REFUSED);
		source_end();	/* before the VM runs here again, where the disk lets us */
		resume_source();
		run_unshared();
		goto ended;

give_up:	source_state = source_after(source_state, FAILED);
		resume_source();
		source_end();

ended:		skip;
		d_step { cut() };
rest:		source_at_rest = true;
endrest:	if
		:: source_journal != source_state -> source_journal = source_state; run_unshared(); goto endrest
		fi
	} unless {
		atomic { kill_source -> cut(); source_at_rest = false }
	};
	d_step { kill_source = false };
	goto start
}

/* ------------------------------------------------------------------------------------------- destination */

active proctype destination() {

start:	{
		/* recovery, as host/recovery.py */
		destination_state = destination_journal;
		if
		:: destination_state == SWITCHING_OVER && may_have_switched -> destination_step(SWITCHED)
		:: (destination_state == SWITCHING_OVER && !may_have_switched) || destination_state == PREPARING || destination_state == COPYING ->
			destroy_destination();
			destination_journal = ABORTED; destination_state = ABORTED
		:: else
		fi;
		if
		:: destination_state == POSTCOPY || destination_state == POSTCOPY_PAUSED ->
#ifdef FORGET_THE_HALF
			d_step { destination_qemu = GONE; part() };
			destination_journal = ABORTED; destination_state = ABORTED
#else
			destination_journal = POSTCOPY_PAUSED; destination_state = POSTCOPY_PAUSED;
			if
			:: lanes -> resume_destination()	/* its enclave has outlived the agent before */
			:: !lanes
			fi
#endif
		:: destination_state == COMPLETED && destination_nowhere -> destination_qemu = GONE
		:: else
		fi;

rest:		destination_at_rest = true;
endrest:	if
		:: !destination_wrote -> destination_journal = destination_state; goto endrest
		/* a half that is gone, or needs the other one no more */
		:: destination_wrote && destination_state == POSTCOPY_PAUSED && destination_qemu == GONE ->
			atomic { destination_journal = COMPLETED; destination_state = COMPLETED; destination_nowhere = true };
			goto endrest
		:: destination_wrote && destination_state == POSTCOPY_PAUSED && destination_qemu != GONE && whole ->
			resume_destination();
			destination_step(ARRIVED);
			goto endrest
		/* an operator's word */
		:: atomic { destination_wrote && destination_state == POSTCOPY_PAUSED && destination_qemu != GONE && !whole &&
			lost_at_the_source -> destination_step(DROP_HERE); destination_nowhere = true };
			d_step { destination_qemu = GONE; part() };
			goto endrest
		/* the source comes back, and is told how it stands */
		:: atomic { channel && was_said(rejoin) && destination_wrote &&
			destination_state == POSTCOPY_PAUSED && destination_qemu != GONE && !whole -> destination_at_rest = false }
			goto joining
		:: channel && was_said(rejoin) && destination_wrote && destination_state == ABORTED && !was_said(ticket_refused) ->
			say(ticket_refused); goto endrest
		:: channel && was_said(rejoin) && destination_wrote && destination_state == COMPLETED && taken && !destination_nowhere &&
		   !was_said(arrived) ->
			say(arrived); goto endrest
		:: channel && was_said(rejoin) && destination_wrote && destination_nowhere ->	/* there is nothing to join */
			d_step { cut() };
			goto endrest
		/* an id is taken once */
		:: atomic { channel && was_said(prepare) && !taken ->
			taken = true; destination_at_rest = false; destination_journal = PREPARING; destination_state = PREPARING }
		fi;

		destination_qemu = WAITING;	/* launched */
		say(prepared);
		if
		:: true -> goto give_up
		:: true
		fi;
		destination_step(PREPARED);
		if
		:: was_said(postcopy_ticket)
		:: true -> goto give_up
		fi;
		if
		:: destination_journal = destination_after(destination_state, TICKET_HELD)
		:: true -> goto give_up
		fi;
		destination_state = destination_journal;
#ifdef TICKET_LETS_RUN
		d_step {
			if
			:: destination_qemu == WAITING -> destination_qemu = RUNNING; ran_there = true
			:: else
			fi
		};
#endif
		say(ticket_held);
		if
		:: has_switched
		:: true -> goto give_up
		fi;
		if
		:: destination_journal = destination_after(destination_state, SWITCHED)
		:: true -> goto give_up
		fi;
		destination_state = destination_journal;
		if
		:: resume_destination()
		:: !lanes -> goto serve		/* it would stand still at the first page: the halves are joined first */
		fi;
		say(receipt);

serve:		if
		:: whole && destination_qemu != GONE -> goto arrives
		:: !lanes && !whole
		:: destination_qemu == GONE
		fi;
		d_step { cut() };
		destination_state = destination_after(destination_state, FAILED);
		destination_end();
		goto rest;

joining:	atomic {
			if
			:: channel -> destination_listens = true; said = said | (1 << rejoined)
			:: else
			fi
		};
		if
		:: lanes
		:: !channel -> goto still_parted
		:: destination_qemu == GONE -> d_step { cut() }; goto still_parted
		fi;
		if
		:: destination_step(REJOINED)
		:: atomic { crashes < CRASHES -> crashes++; cut() }
			goto still_parted
		fi;
		resume_destination();
		goto serve;
still_parted:	destination_state = destination_after(destination_state, FAILED);
		goto rest;

arrives:	resume_destination();
		destination_state = destination_after(destination_state, ARRIVED);
		say(arrived);
		destination_end();
		goto rest;

give_up:	if
		:: destination_state == SWITCHING_OVER && destination_qemu == GONE ->
			say(ticket_refused);
			destination_state = destination_after(destination_state, REFUSED)
		:: destination_state == SWITCHING_OVER && destination_qemu != GONE ->
#ifndef LOOK_BEFORE_CUT
			d_step { cut() };	/* after this look nothing can come any more */
#endif
			if
			:: may_have_switched ->		/* kept: recovery goes on from here */
				d_step { cut() };
				goto start
			:: !may_have_switched ->
				destroy_destination();
				destination_state = destination_after(destination_state, FAILED)
			fi
		:: destination_state != SWITCHING_OVER ->
			destroy_destination();
			destination_state = destination_after(destination_state, FAILED)
		fi;
		destination_end();
		d_step { cut() };
		goto rest
	} unless {
		atomic { kill_destination ->
			if
			:: lanes && has_switched -> channel = false; orphan = true
			:: cut()
			fi;
			destination_at_rest = false
		}
	};
	d_step { kill_destination = false };
	goto start
}

/* ------------------------------------------------------------------------------------------- the others */

/* What the two QEMUs do without being told. */
active proctype qemus() {
end:	do
	:: atomic { in_switch && lanes && destination_qemu == WAITING -> in_switch = false; destination_qemu = PAUSED; came_through = true }
	:: atomic { was_connected && !lanes && destination_qemu == WAITING -> destination_qemu = GONE }	/* its stream ended */
	:: atomic { lanes && !whole && source_qemu == HALF && has_switched -> whole = true }
	:: atomic { orphan && whole ->	/* no QEMU, but what it ends with */
		part()
#ifdef WAIT_FOR_ARRIVED
		; said_bye = true
#endif
	   }
	od
}

active proctype fate() {
end:	do
	:: atomic { crashes < CRASHES && !kill_source -> crashes++; kill_source = true }
	:: atomic { crashes < CRASHES && !kill_destination -> crashes++; kill_destination = true }
	:: atomic { crashes < CRASHES && (channel || lanes) -> crashes++; cut() }
	:: atomic { crashes < CRASHES && source_qemu != GONE ->
		crashes++; source_qemu = GONE; source_lost = source_lost || !whole; part()
	   }
	:: atomic { crashes < CRASHES && destination_qemu != GONE ->
		crashes++; destination_lost = destination_lost || has_switched; destination_qemu = GONE; part()
	   }
	od
}

/* ------------------------------------------------------------------------------------------- the claims */

#define lost (source_lost || destination_lost)
#define can_run_at_source (source_qemu == RUNNING || source_qemu == PAUSED)
#define can_be_joined (source_qemu == HALF && (has_switched || (in_switch && destination_qemu == WAITING)))
#define all_there (has_switched && whole)
#define unshared (source_qemu == HALF && !came_through)
#define settled (begun && source_at_rest && destination_at_rest && !kill_source && !kill_destination && \
	source_wrote && destination_wrote && (lost || split_switch || \
	(ended(source_state) && ended(destination_state) && (source_qemu == RUNNING || (destination_qemu == RUNNING && whole)))))

/* Nobody does what the table does not have. */
ltl in_the_table { [] (source_state != 0 && destination_state != 0 && source_journal != 0 && destination_journal != 0) }
/* Two copies never run. */
ltl never_two { [] !(source_qemu == RUNNING && destination_qemu == RUNNING) }
/* There is always a copy that can run, or halves that can be joined; or the source's has not become a half but in its QEMU's eyes. */
ltl never_none { [] (can_run_at_source || can_be_joined || all_there || unshared || lost) }
/* What has run at the destination does not run at the source any more, but where it was lost there. */
ltl never_back { [] !(source_qemu == RUNNING && ran_there && !destination_lost) }
/* Who says that the VM runs there has given it up: it does not run here. */
ltl given_up { [] !(source_at_rest && (source_state == POSTCOPY || source_state == POSTCOPY_PAUSED) && source_qemu == RUNNING) }
/* In the end both have ended, and the VM runs. */
ltl ends { <>[] settled }
